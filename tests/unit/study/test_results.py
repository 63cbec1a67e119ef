"""Verdicts from the files of runs and evaluations that are made up here, so that what must come out is known."""

import json

import numpy as np
import pytest
import yaml

from liquid_llm.errors import DataError
from liquid_llm.jobs.study_result import show_study
from liquid_llm.study.folder import StudyFolder
from liquid_llm.study.plan import Unit
from liquid_llm.study.results import measure_pace, summarise, units_at_seconds

SEEDS, STEPS = [5, 6, 7], 100
GAINS = {"plain": 0.0, "online": -0.2, "stored": 0.0}  # of cross-entropy a token, at equal tokens
PACES = {"plain": 1.0, "online": 1.5, "stored": 1.0}


def evaluation(gain, seed, *, texts=40, answers=0, rights=0):
    """What ``evaluate`` says of a student whose cross-entropy is ``gain`` higher than 3 nats, up to the seed's own."""
    noise = np.random.default_rng(seed)
    rows = []
    for number in range(texts):
        positions = 50 + number
        ce = 3.0 + gain + 0.5 * (number % 7) + float(noise.normal(0, 0.02))
        row = {
            "type": "lm" if number % 2 else "code",
            "id": f"text-{number}",
            "positions": positions,
            "ce": ce * positions,
        }
        if number % 2:
            row |= {"kl_positions": positions, "kl": positions * (0.5 + gain), "agreement_positions": positions}
            row |= {"agreement": positions // 2}
        rows.append(row)
    marked = [{"type": "math", "id": str(one), "right": one < rights} for one in range(answers)]
    return {"texts": rows, "answers": marked, "measures": {"all": {"ce": {"value": 3.0 + gain, "error": 0.1}}}}


def run(folder, unit, steps, pace, gain):
    place = folder.run_dir(unit)
    place.mkdir(parents=True)
    rows = [{"kind": "eval", "step": 0, "val_loss_student": 9.0, "val_kd": 5.0, "by_type": {"lm": {"val_loss": 9.0}}}]
    rows += [
        {"kind": "train", "step": step, "positions": 1000, "tokens_per_second": 100 / pace, "tokens_seen": 100 * step}
        for step in range(10, steps + 1, 10)
    ]
    rows += [
        {
            "kind": "eval",
            "step": steps,
            "val_loss_student": 3.0 + gain,
            "val_kd": 0.5,
            "by_type": {"lm": {"val_loss": 3.0}},
        }
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.mark_done(unit)


@pytest.fixture
def folder(tmp_path):
    """Three arms and three seeds, all run at equal tokens; a store that took 40 seconds is read by one of them."""
    folder = StudyFolder(tmp_path / "study")
    arms = [
        {"name": name, "options": {"kd_alpha_start": 0.7}, "counts": {"n": name}, "steps": STEPS}
        | {"stores": ["S"] if name == "stored" else []}
        for name in GAINS
    ]
    plan = {"face": "train", "arms": arms, "seeds": SEEDS, "at": ["tokens", "seconds"], "least_gain": 0.01}
    folder.add_to_plan({**plan, "remarks": ["said at the start"]})
    capture = {"stores": ["S"], "seconds": 40.0, "complete": True, "begun": 1, "ended": 1, "written": 9, "options": {}}
    folder.write("captures.json", [capture])
    for name, gain in GAINS.items():
        for seed in SEEDS:
            unit = Unit(name, seed)
            run(folder, unit, STEPS, PACES[name], gain)
            folder.keep_evaluation(unit, evaluation(gain, seed, answers=100, rights=10 if name == "plain" else 60))
    return folder


def add_runs_at_seconds(folder, gain):
    pace = measure_pace(folder, folder.plan())
    folder.write("pace.json", pace.at_seconds)
    for unit in units_at_seconds(folder.plan(), pace):
        run(folder, unit, unit.steps, PACES["plain"], gain)
        folder.keep_evaluation(unit, evaluation(gain, unit.seed, answers=100, rights=60))


def verdicts(folder, **wanted):
    found = summarise(folder)["verdicts"]
    return [one for one in found if all(one[key] == value for key, value in wanted.items())]


def test_the_baseline_is_run_for_as_long_as_each_arm_takes_with_its_capture(folder):
    pace = measure_pace(folder, folder.plan())
    assert pace.at_seconds == {"online": 150, "stored": 140}
    assert [(one.arm, one.seed, one.steps) for one in units_at_seconds(folder.plan(), pace)] == [
        ("plain", seed, steps) for seed in SEEDS for steps in (140, 150)
    ]


def test_a_baseline_that_reads_a_store_pays_for_it_too(folder):
    plan = folder.plan()
    readers = [{**arm, "stores": ["S"] if arm["name"] != "online" else []} for arm in plan["arms"]]
    pace = measure_pace(folder, {**plan, "arms": readers})
    # Its 20 seconds of the capture are gone before its first step; who reads the same store, as fast, takes as long.
    assert pace.at_seconds == {"online": 130, "stored": 100}


def test_what_was_once_decided_stays_whatever_the_machine_does_later(folder):
    add_runs_at_seconds(folder, -0.2)
    run(folder, Unit("online", 8), STEPS, 99.0, 0.0)
    plan = folder.add_to_plan({**folder.plan(), "seeds": [8]})
    assert measure_pace(folder, plan).at_seconds == {"online": 150, "stored": 140}


def test_at_equal_tokens_and_at_equal_seconds_are_two_questions(folder):
    add_runs_at_seconds(folder, -0.2)  # with half as many steps more, plain training gets there too
    [tokens] = verdicts(folder, arm="online", at="tokens", type="all", measure="ce")
    [seconds] = verdicts(folder, arm="online", at="seconds", type="all", measure="ce")
    assert tokens["word"] == "better"
    assert tokens["difference"] == pytest.approx(-0.2, abs=0.02)
    assert (seconds["word"], seconds["baseline_steps"]) == ("not better", 150)
    sentences = dict(one.split(": ", 1) for one in summarise(folder)["sentences"])
    assert sentences["online"].startswith("At equal tokens better: held-out cross-entropy 0.2")
    assert "At equal seconds (the baseline with 150 steps) not better" in sentences["online"]
    assert "the baseline with 140 steps, its share of the captures, 40 s, counted" in sentences["stored"]


def test_each_measure_is_over_the_texts_that_have_it(folder):
    found = verdicts(folder, arm="online", at="tokens")
    counts = {(one["measure"], one["type"]): one["num_texts"] for one in found}
    assert counts == {
        ("ce", "all"): 40, ("ce", "lm"): 20, ("ce", "code"): 20, ("kl", "all"): 20, ("kl", "lm"): 20,
        ("agreement", "all"): 20, ("agreement", "lm"): 20, ("answers", "all"): 100,
    }  # fmt: skip
    [answers] = verdicts(folder, arm="online", at="tokens", measure="answers")
    assert (answers["value"], answers["baseline_value"], answers["word"]) == (0.6, 0.1, "better")


def test_comparisons_are_counted_and_nothing_is_hidden(folder):
    result = summarise(folder)
    assert result["comparisons"] == len(result["verdicts"]) == 16
    assert result["by_chance"] == 0.4
    assert "said at the start" in result["remarks"]
    assert "online, at equal seconds: 3 of 3 seeds are not done yet." in result["remarks"]


def test_arms_with_other_numbers_of_tokens_are_pointed_at(folder):
    unit = Unit("stored", SEEDS[0])
    path = folder.run_dir(unit) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"tokens_seen": 10000', '"tokens_seen": 20000'))
    assert "stored trained on 2.00 times the baseline's tokens: these are not equal." in summarise(folder)["remarks"]


def test_a_capture_that_was_killed_or_found_its_store_is_pointed_at(folder):
    [one] = folder.read("captures.json")
    folder.write("captures.json", [{**one, "begun": 2, "written": 0}])
    remarks = " ".join(summarise(folder)["remarks"])
    assert "The capture into S was killed or failed once" in remarks
    assert "All of S was there before the study" in remarks


def test_students_that_were_judged_on_other_texts_are_no_pairs(folder):
    folder.keep_evaluation(Unit("online", SEEDS[0]), evaluation(0.0, 1, texts=39))
    with pytest.raises(DataError, match="different texts"):
        summarise(folder)


def test_students_that_cut_a_text_otherwise_are_not_compared_by_token(folder):
    found = evaluation(0.0, 1)
    found["texts"][0]["positions"] += 1
    folder.keep_evaluation(Unit("online", SEEDS[0]), found)
    result = summarise(folder)
    assert not [
        one for one in result["verdicts"] if (one["arm"], one["measure"], one["type"]) == ("online", "ce", "all")
    ]
    assert any("cross-entropy is over different positions" in one for one in result["remarks"])


def test_what_is_shown_comes_from_the_files_and_is_the_same_each_time(folder, capsys):
    add_runs_at_seconds(folder, -0.2)
    assert show_study(str(folder.root)) == 0
    shown = capsys.readouterr().out
    page, data = (folder.root / "study.html").read_text(), (folder.root / "study.json").read_text()
    assert show_study(str(folder.root)) == 0
    assert capsys.readouterr().out == shown
    assert ((folder.root / "study.html").read_text(), (folder.root / "study.json").read_text()) == (page, data)
    for name in GAINS:
        assert name in shown
        assert f">{name}<" in page
    for what in ("comparisons", "150", "said at the start"):
        assert what in shown
        assert what in page
    tables = (folder.root / "study.md").read_text()
    for sentence in yaml.safe_load(data)["sentences"]:
        assert f"- {sentence}\n" in tables
    assert "| online | 2.800 | – | – | 60.0 |\n" in tables, "its own figures, of its own length alone"
    assert "| plain | 3.000 | – | – | 10.0 |\n" in tables
    words = [one["word"] if not one["worse"] else "worse" for one in yaml.safe_load(data)["verdicts"]]
    assert "worse" in words, "of the seconds"
    assert [words.count(word) for word in set(words)] == [page.count(f">{word}<") for word in set(words)]
    for key in ("loss", "kl", "loss-seconds", "kl-seconds"):
        assert f'id="plot-{key}"' in page
    assert yaml.safe_load(data)["version"] == 1


def test_a_single_text_has_no_interval(folder, capsys):
    for name, gain in GAINS.items():
        for seed in SEEDS:
            folder.keep_evaluation(Unit(name, seed), evaluation(gain, seed, texts=1))
    assert show_study(str(folder.root)) == 0
    assert "[−∞, +∞]" in capsys.readouterr().out


def test_hostile_names_stay_text(tmp_path):
    folder = StudyFolder(tmp_path)
    name = "<script>alert(1)</script>"
    arms = [{"name": one, "options": {}, "counts": {"n": one}, "stores": [], "steps": 10} for one in ("plain", name)]
    plan = {"face": "train", "arms": arms, "seeds": [0], "at": ["tokens"], "least_gain": 0.01, "remarks": [name]}
    folder.add_to_plan(plan)
    for arm in ("plain", name):
        run(folder, Unit(arm, 0), 10, 1.0, 0.0)
        folder.keep_evaluation(Unit(arm, 0), evaluation(0.0, 0))
    assert show_study(str(tmp_path)) == 0
    assert "<script>alert" not in (tmp_path / "study.html").read_text()
