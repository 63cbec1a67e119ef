"""Arms, their combinations, and the folders they run in."""

import pytest

from liquid_llm.errors import UsageError
from liquid_llm.study.plan import Arm, Study, Unit, make_arms, slug

PLAIN, KD = Arm("plain", {"kd_alpha_start": 0.0}), Arm("kd", {"kd_alpha_start": 0.7})


def test_every_named_arm_is_made_with_every_combination_of_what_is_varied():
    lr = [Arm("lr=1", {"lr": 1.0}), Arm("lr=2", {"lr": 2.0})]
    clip = [Arm("grad_clip=3", {"grad_clip": 3.0})]
    assert [arm.name for arm in make_arms([], [lr])] == ["lr=1", "lr=2"]
    arms = make_arms([PLAIN, KD], [lr, clip])
    assert [arm.name for arm in arms] == [
        f"{name} lr={rate} grad_clip=3" for name in ("plain", "kd") for rate in (1, 2)
    ]
    assert arms[3].options == {"kd_alpha_start": 0.7, "lr": 2.0, "grad_clip": 3.0}


def test_one_arm_is_no_study_and_two_have_two_names():
    with pytest.raises(UsageError, match="two arms or more"):
        make_arms([PLAIN], [])
    with pytest.raises(UsageError, match="two arms or more"):
        make_arms([], [])
    with pytest.raises(UsageError, match="two arms have one name"):
        make_arms([PLAIN, KD, Arm("plain", {})], [])


def test_arms_take_turns():
    study = Study("train", [PLAIN, KD], (3, 4), {})
    assert [(one.arm, one.seed) for one in study.units()] == [("plain", 3), ("kd", 3), ("plain", 4), ("kd", 4)]


def test_every_unit_has_a_folder_of_its_own():
    names = ["stored T=1", "stored T:1", "stored/T=1", "../stored", "..", "", "kd_alpha_start=0.7", "x" * 300, "é", "è"]
    units = [Unit(name, seed, steps) for name in names for seed in (0, 1) for steps in (None, 20)]
    folders = [one.folder for one in units]
    assert len(set(folders)) == len(units)
    assert slug("kd_alpha_start=0.7") == "kd_alpha_start=0.7"
    for folder in folders:
        arm, seed = folder.split("/")
        assert ".." not in arm
        assert len(arm) < 100
        assert seed.startswith("seed-")
