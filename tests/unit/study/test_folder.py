"""What a study's folder keeps: plans grow and do not change, runs are claimed, files are whole."""

import threading

import pytest

from liquid_llm.errors import UsageError
from liquid_llm.study.folder import Busy, StudyFolder
from liquid_llm.study.plan import Unit


def plan(*arms, seeds=(0, 1), face="train", **other):
    made = [{"name": name, "counts": counts, "stores": [], "steps": 10} for name, counts in arms]
    return {"face": face, "arms": made, "seeds": list(seeds), "remarks": [], **other}


PLAIN, KD = ("plain", {"lr": 1.0}), ("kd", {"lr": 1.0, "kd_alpha_start": 0.7})


def test_arms_and_seeds_are_added(tmp_path):
    folder = StudyFolder(tmp_path)
    folder.add_to_plan(plan(PLAIN, KD, at=["tokens"]))
    merged = folder.add_to_plan(plan(PLAIN, ("new", {}), seeds=(2, 0), at=["seconds"]))
    assert [arm["name"] for arm in merged["arms"]] == ["plain", "kd", "new"]
    assert merged["seeds"] == [0, 1, 2]
    assert merged["at"] == ["seconds"]
    assert folder.plan() == merged


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (plan(PLAIN, ("kd", {"lr": 2.0, "kd_alpha_start": 0.7})), "arm 'kd': lr was 1.0, and now it is 2.0"),
        (plan(PLAIN, ("kd", {"lr": 1.0})), "arm 'kd': kd_alpha_start was 0.7, and now it is not given"),
        (plan(KD, PLAIN), "the baseline, was 'plain', and now it is 'kd'"),
        (plan(PLAIN, KD, face="anneal"), "it was begun with liquid train, and now it is liquid anneal"),
    ],
)
def test_what_contradicts_is_refused_and_changes_nothing(tmp_path, changed, words):
    folder = StudyFolder(tmp_path)
    before = folder.add_to_plan(plan(PLAIN, KD))
    with pytest.raises(UsageError, match="the study in this folder is another") as caught:
        folder.add_to_plan(changed)
    assert words in str(caught.value)
    assert folder.plan() == before


def test_a_folder_that_is_none_or_of_another_release_is_refused(tmp_path):
    folder = StudyFolder(tmp_path)
    with pytest.raises(UsageError, match="no study's folder"):
        folder.plan()
    folder.write("plan.json", {"version": 99})
    with pytest.raises(UsageError, match="newer release"):
        folder.plan()
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UsageError, match="not a JSON file"):
        folder.plan()


def test_a_claim_is_held_by_one_and_let_go(tmp_path):
    folder, unit = StudyFolder(tmp_path), Unit("kd", 0)
    with folder.claim(unit.folder):
        with pytest.raises(Busy), folder.claim(unit.folder):
            raise AssertionError("held twice")
        with folder.claim(Unit("kd", 1).folder), folder.claim(Unit("kd", 0, 20).folder):
            pass
    with folder.claim(unit.folder):
        pass


def test_plans_of_many_at_once_are_all_kept(tmp_path):
    asked = [plan(PLAIN, (f"arm {number}", {"seed": number})) for number in range(8)]
    threads = [threading.Thread(target=StudyFolder(tmp_path).add_to_plan, args=(one,)) for one in asked]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert {arm["name"] for arm in StudyFolder(tmp_path).plan()["arms"]} == {"plain", *(f"arm {n}" for n in range(8))}


def test_what_is_done_and_found_is_kept_by_unit(tmp_path):
    folder = StudyFolder(tmp_path)
    one, longer = Unit("kd", 0), Unit("kd", 0, 30)
    folder.mark_done(one)
    folder.keep_evaluation(one, {"texts": []})
    assert (folder.is_done(one), folder.is_done(longer)) == (True, False)
    assert (folder.evaluation(one), folder.evaluation(longer)) == ({"texts": []}, None)
