"""The words and files a study is asked for with."""

import pytest
import yaml
from tests.support.sources import REPOSITORY

from liquid_llm.cli.main import main
from liquid_llm.cli.study import read_study
from liquid_llm.config import build_capture_config, build_run_config
from liquid_llm.errors import UsageError
from liquid_llm.sources import overlay

WORDS = ["--study_dir=there", "--dataset_manifest=m.jsonl"]


@pytest.fixture
def config(tmp_path):
    def write(**values):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return [f"--config={path}"]

    return write


def arms(study):
    return {arm.name: arm.options for arm in study.arms}


def test_an_option_is_varied_over_values():
    study, folder = read_study("train", [*WORDS, "--vary", "kd_alpha_start=0,0.7", "--seeds=3,4", "--max-steps=50"])
    assert folder == "there"
    assert arms(study) == {"kd_alpha_start=0": {"kd_alpha_start": 0.0}, "kd_alpha_start=0.7": {"kd_alpha_start": 0.7}}
    assert study.options == {"dataset_manifest": "m.jsonl", "max_steps": 50}
    assert (study.seeds, study.at, study.processes, study.least_gain) == ((3, 4), ("tokens", "seconds"), 1, 0.01)


def test_a_dry_run_is_of_the_study_and_not_of_its_runs(config):
    for given in (["--dry-run"], config(dry_run=True)):
        study, _ = read_study("train", [*WORDS, "--vary=lr=1,2", *given])
        assert study.dry_run
        assert "dry_run" not in study.options
    assert not read_study("train", [*WORDS, "--vary=lr=1,2", "--no-dry-run"])[0].dry_run


def test_several_are_combined_and_values_may_hold_commas():
    study, _ = read_study("train", [*WORDS, "--vary=student=from:T,layers=8;liquid-16m", "--vary", "lr=1e-3,2e-3"])
    assert list(arms(study)) == [
        "student=from:T,layers=8 lr=1e-3",
        "student=from:T,layers=8 lr=2e-3",
        "student=liquid-16m lr=1e-3",
        "student=liquid-16m lr=2e-3",
    ]
    assert arms(study)["student=liquid-16m lr=2e-3"] == {"student": "liquid-16m", "lr": 2e-3}
    study, _ = read_study("train", [*WORDS, "--vary=alpha_by_type=code=0.1,lm=0.2;code=0.3"])
    assert next(iter(arms(study).values())) == {"sources": {"code": {"alpha": 0.1}, "lm": {"alpha": 0.2}}}


def test_a_file_lists_arms_captures_and_how_to_evaluate(config):
    given = config(
        arms=[{"name": "plain", "kd_alpha_start": 0, "kd_alpha_end": 0}, {"name": "T=1", "kd-temperature": 1}],
        captures=[{"math_logits_dir": "S", "batch_size": 7}],
        evaluation={"teacher": "T"},
        dataset_manifest="m.jsonl",
        mc_teacher_id="teacher",
        seeds=[1, 2],
        study_dir="there",
        batch_size=3,
    )
    study, folder = read_study("train", given)
    assert (folder, study.seeds) == ("there", (1, 2))
    assert arms(study) == {"plain": {"kd_alpha_start": 0.0, "kd_alpha_end": 0.0}, "T=1": {"kd_temperature": 1.0}}
    assert study.captures == [
        {"math_logits_dir": "S", "batch_size": 7, "dataset_manifest": "m.jsonl", "mc_teacher_id": "teacher"}
    ]
    assert study.evaluation == {"teacher": "T"}
    assert study.options == {"dataset_manifest": "m.jsonl", "mc_teacher_id": "teacher", "batch_size": 3}
    assert read_study("train", [*given, "--seeds=9", "--lr=1"])[0].seeds == (9,), "the command line wins"


def test_a_file_varies_too_and_named_arms_are_combined_with_it(config):
    given = config(arms=[{"name": "a"}, {"name": "b", "lr": 1}], vary={"betas": [[0.9, 0.95], [0.8, 0.9]], "lr": [2]})
    study, _ = read_study("train", [*WORDS, *given])
    assert list(arms(study)) == [f"{name} betas={two} lr=2" for name in "ab" for two in ("0.9,0.95", "0.8,0.9")]
    assert arms(study)["a betas=0.8,0.9 lr=2"] == {"betas": (0.8, 0.9), "lr": 2.0}


def test_annealing_is_varied_with_its_own_options():
    study, _ = read_study("anneal", ["--study_dir=there", "--dataset_name=d", "--vary=alpha=0,0.5"])
    assert study.face == "anneal"
    assert list(arms(study)) == ["alpha=0", "alpha=0.5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*WORDS], "two arms or more"),
        ([*WORDS, "--vary=lr=1"], "two arms or more"),
        ([*WORDS, "--vary=lr=1,1"], "two arms have one name"),
        ([*WORDS, "--vary=lrr=1,2"], "did you mean --lr"),
        ([*WORDS, "--vary=lr=1,x"], "expected a number"),
        ([*WORDS, "--vary=lr"], "nothing to vary"),
        ([*WORDS, "--vary=seed=1,2"], "a study sets this option itself"),
        ([*WORDS, "--run-id=x"], "a study sets this option itself"),
        ([*WORDS, "--no-restart"], "a study sets this option itself"),
        ([*WORDS, "--output_gcs_uri=x", "--vary=lr=1,2"], "are the same: leave one out"),
        (["--vary=lr=1,2"], "the study's folder is missing"),
        ([*WORDS, "--at=minutes", "--vary=lr=1,2"], "expected one of tokens, seconds"),
    ],
)
def test_what_cannot_work_is_said(words, message):
    with pytest.raises(UsageError) as caught:
        read_study("train", words)
    assert message in str(caught.value).replace("Did", "did")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": {"plain": {}}}, "not a list"),
        ({"arms": [{"lr": 1}, {"name": "b"}]}, "arm 1: an arm without a name"),
        ({"arms": [{"name": "a", "lrr": 1}, {"name": "b"}]}, "arm 1, a"),
        ({"arms": [{"name": "a", "seed": 1}, {"name": "b"}]}, "a study sets this option itself"),
        ({"arms": [{"name": "a", "dry_run": True}, {"name": "b"}]}, "a study sets this option itself"),
        ({"vary": ["lr=1,2"]}, "expected option: [value, value] lines"),
        ({"captures": [{"topk": "many"}], "vary": {"lr": [1, 2]}}, "captures: topk"),
        ({"evaluation": {"teachers": 1}, "vary": {"lr": [1, 2]}}, "evaluation"),
        ({"evaluation": {"which": "best"}, "vary": {"lr": [1, 2]}}, "a study sets this option itself"),
        ({"evaluation": {"json": "found.json"}, "vary": {"lr": [1, 2]}}, "Look into evaluations/"),
        ({"output-gcs-uri": "x", "run_id": "y"}, "a study sets this option itself"),
    ],
)
def test_what_cannot_work_in_a_file_is_said(config, values, message):
    with pytest.raises(UsageError) as caught:
        read_study("train", [*WORDS, *config(**values)])
    assert message in str(caught.value)


EXAMPLES = REPOSITORY / "examples" / "studies"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_the_studies_that_come_along_can_be_read(name):
    study, folder = read_study("train", [f"--config={EXAMPLES / name}"])
    assert folder
    for arm in study.arms:
        build_run_config("train", overlay(study.options, arm.options))
    for capture in study.captures:
        build_capture_config(capture)


def test_help_and_a_folder_that_is_none(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    shown = capsys.readouterr().out
    for name in ("--vary", "--seeds", "--processes", "--kd_alpha_start"):
        assert name in shown
    assert main(["study", str(tmp_path)]) == 2
    assert "this is no study's folder" in capsys.readouterr().err
    assert main(["study", "--study_dir=gs://b/s", "--dataset_manifest=m", "--vary=lr=1,2"]) == 2
    assert "a study's folder must be on a file system" in capsys.readouterr().err
