"""How a command line is read: spellings, kinds, files, and every way of getting it wrong."""

import argparse
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.cli.parse import AS_JSON, Positional, build_parser, converter, expand_date, normalise, parse
from liquid_llm.errors import UsageError
from liquid_llm.options import ALIASES, ANNEAL, CAPTURE, EVERY, OPTIONS, TRAIN, Option, options_of
from liquid_llm.verbosity import asked_level, one_command

GPU_MEMORY = Option("gpu_memory", "size", "run", "gpu_memory", None, "how much", minimum=1)


def read(face, *argv):
    return parse(options_of(face), list(argv), "prog", "what it does", face=face)


@pytest.mark.parametrize("face", EVERY)
def test_only_given_options_are_returned(face):
    assert read(face) == {}


@pytest.mark.parametrize("spelling", ["--grad-accum=2", "--grad_accum=2"])
def test_dashes_and_underscores_are_the_same(spelling):
    assert read(ANNEAL, spelling) == {"grad_accum": 2}


@pytest.mark.parametrize("face", EVERY)
def test_an_option_may_be_called_what_other_trainers_call_it(face, tmp_path, capsys):
    shown = build_parser(options_of(face), "prog", "", face, ()).format_help()
    for option in options_of(face):
        for alias in option.aliases:
            value = option.choices[0] if option.choices else "7"
            assert read(face, f"--{alias}={value}") == read(face, f"--{option.name}", value)
            assert read(face, f"--{alias.replace('_', '-')}", value) == read(face, f"--{option.name}={value}")
            assert f"--{alias}" in shown
            file = tmp_path / "run.yaml"
            file.write_text(f"{alias}: {value}")
            assert read(face, f"--config={file}") == read(face, f"--{option.name}={value}")
            file.write_text(f"{alias}: {value}\n{option.name}: {value}")
            with pytest.raises(UsageError, match=f"given twice.*{alias} and {option.name}"):
                read(face, f"--config={file}")


def test_every_other_name_is_an_option_of_training_and_none_of_a_reference():
    for face in (TRAIN, ANNEAL):
        taken = {alias for option in options_of(face) for alias in option.aliases}
        assert taken == {*ALIASES, "teacher_model_name_or_path"}
        assert not taken & {option.name for option in OPTIONS}
        with pytest.raises(UsageError, match="unknown option --learning_rate"):
            parse(options_of(face, reference=True), ["--learning_rate=1"], "prog", "")
    assert read(CAPTURE, "--teacher_model_name_or_path=x") == {"mc_teacher_id": "x"}


def test_a_value_with_dashes_is_left_alone():
    assert normalise(["--output-gcs-uri=gs://a-b/c-d", "--run-id", "x-y"]) == [
        "--output_gcs_uri=gs://a-b/c-d",
        "--run_id",
        "x-y",
    ]


@pytest.mark.parametrize(
    ("words", "value"),
    [(["--hybrid"], True), (["--hybrid=true"], True), (["--hybrid=false"], False), (["--hybrid", "false"], False)],
)
def test_booleans_are_bare_or_with_a_value(words, value):
    assert read(TRAIN, *words) == {"hybrid": value}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--grad_checkpoint"], True),
        (["--grad-checkpoint=true"], True),
        (["--grad_checkpoint=false"], False),
        (["--no-grad_checkpoint"], False),
        (["--no_grad_checkpoint"], False),
        (["--grad_checkpoint=auto"], "auto"),
        (["--grad_checkpoint", "auto"], "auto"),
    ],
)
def test_checkpointing_is_yes_no_or_auto(words, value):
    assert read(TRAIN, *words) == {"grad_checkpoint": value}


@pytest.mark.parametrize("face", EVERY)
def test_every_boolean_has_a_no(face):
    for option in options_of(face):
        if option.kind.endswith("bool"):
            assert read(face, f"--no-{option.name}") == {option.name: False}


def test_a_batch_is_a_number_or_auto_and_a_number_alone_for_capture():
    assert read(TRAIN, "--batch_size=auto") == {"batch_size": "auto"}
    assert read(TRAIN, "--batch_size=16") == {"batch_size": 16}
    with pytest.raises(UsageError, match="whole number"):
        read(CAPTURE, "--batch_size=auto")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("22", 22 * 2**30),
        ("22GiB", 22 * 2**30),
        ("22.5 gib", int(22.5 * 2**30)),
        ("24GB", 24 * 10**9),
        ("512MiB", 2**29),
        ("1tb", 10**12),
    ],
)
def test_sizes_of_memory(text, size):
    assert converter(GPU_MEMORY)(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "22 GiBs", "22 bananas", "1,5GB", "22528"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="22GiB, 24GB or 22528MiB"):
        converter(GPU_MEMORY)(text)


def test_a_command_may_take_more_than_its_face(tmp_path):
    options = (GPU_MEMORY, *options_of(TRAIN))
    (tmp_path / "run.yaml").write_text("gpu_memory: 2MiB\nseed: 4\n")
    words = [f"--config={tmp_path / 'run.yaml'}", "--seed=3"]
    assert parse(options, words, "prog", "") == {"gpu_memory": 2**21, "seed": 3}
    assert parse(options, ["--gpu-memory=1MiB", "--seed=3"], "prog", "") == {"gpu_memory": 2**20, "seed": 3}
    with pytest.raises(UsageError, match="Did you mean --gpu_memory"):
        parse(options, ["--gpu_memry=1"], "prog", "")
    with pytest.raises(UsageError, match="unknown option --gpu_memory"):
        read(TRAIN, "--gpu_memory=1")


def test_places_must_all_be_there_and_are_no_options():
    positionals = [Positional("source", "SRC", "from"), Positional("target", "DST", "to")]
    assert parse((), ["a-b", "c"], "prog", "", positionals=positionals) == {"source": "a-b", "target": "c"}
    for words, message in (([], "SRC, DST"), (["a", ""], "DST: got ''"), (["a", "b", "c"], "unexpected word")):
        with pytest.raises(UsageError, match=message):
            parse((), words, "prog", "", positionals=positionals)


def test_lists_are_comma_separated():
    assert read(TRAIN, "--betas=0.9,0.95", "--eval-ctx-lens=512,1024") == {
        "betas": (0.9, 0.95),
        "eval_ctx_lens": (512, 1024),
    }


def test_a_signal_is_named_by_type_in_one_word_or_in_several():
    several = read(TRAIN, "--signal=math_tool=gs://b/m", "--signal", "lm=online:org/m,essays=none")
    assert several == read(TRAIN, "--signal=math_tool=store:gs://b/m,lm=online:org/m,essays=none")
    assert several == {
        "sources": {
            "math_tool": {"teacher": "store:gs://b/m"},
            "lm": {"teacher": "online:org/m"},
            "essays": {"teacher": "none"},
        }
    }
    dated = read(CAPTURE, "--signal=code=gs://b/$(date +%Y)")["sources"]["code"]["teacher"]
    assert re.fullmatch(r"store:gs://b/\d{4}", dated)


def test_trackers_are_names_or_none():
    assert read(TRAIN, "--trackers=none") == {"trackers": ()}
    assert read(ANNEAL, "--trackers=tensorboard") == {"trackers": ("tensorboard",)}


@pytest.mark.parametrize(
    ("face", "word", "message"),
    [
        (ANNEAL, "--alpha_shedule=0:1", "Did you mean --alpha_schedule"),
        (TRAIN, "--metrics-intervall=5", "Did you mean --metrics_interval"),
        (CAPTURE, "--seqlen=5", "Did you mean --seq_len"),
        (ANNEAL, "--hybrid", "unknown option --hybrid. It is an option of liquid train; see prog --help"),
        (ANNEAL, "--no-hybrid", "It is an option of liquid train"),
        (
            ANNEAL,
            "--alpha_by_type=lm=1",
            "It is an option of liquid train; here, with one type of text, it is --alpha.",
        ),
        (ANNEAL, "--temperature_by_type=lm=1", "here, with one type of text, it is --T."),
        (ANNEAL, "--divergence-by-type=lm=jsd", "here, with one type of text, it is --divergence."),
        (TRAIN, "--T=2", "It is an option of liquid anneal; here it is --kd_temperature."),
        (TRAIN, "--train_steps=2", "here it is --max_steps."),
        (TRAIN, "--codec=tail", "It is an option of liquid capture; see prog --help"),
        (CAPTURE, "--precision=float32", "It is an option of liquid anneal and liquid train; see prog --help"),
        (ANNEAL, "--grad_acc=1", "unknown option"),
        (ANNEAL, "stray", "unexpected word"),
        (ANNEAL, "--grad_accum=x", "a whole number"),
        (ANNEAL, "--grad_accum=0", "at least 1"),
        (ANNEAL, "--batch_size=0", "at least 1"),
        (ANNEAL, "--batch_size=many", "a whole number or auto"),
        (ANNEAL, "--grad_checkpoint=perhaps", "true, false or auto"),
        (ANNEAL, "--no-grad_checkpoint=true", "ignored explicit argument"),
        (ANNEAL, "--block_size=0", "at least 2"),
        (ANNEAL, "--lr=0", "more than 0"),
        (ANNEAL, "--lr=nan", "a number"),
        (TRAIN, "--hybrid=maybe", "true or false"),
        (TRAIN, "--teacher_mode=offline", "online, precomputed"),
        (TRAIN, "--betas=0.9,", "comma-separated numbers"),
        (TRAIN, "--output_gcs_uri=", "text"),
        (TRAIN, "--signal=gs://b/m", "TYPE=URI"),
        (TRAIN, "--signal=my type=u", "TYPE=URI"),
        (TRAIN, "--signal=code=", "expected a URI"),
        (TRAIN, "--signal=code=online:", "expected a URI"),
        (TRAIN, "--signal=code=a,code=b", "'code' is named twice"),
        (TRAIN, "--alpha_by_type=0.5", "expected TYPE=VALUE"),
        (TRAIN, "--alpha_by_type=code=1.5", "--alpha_by_type: alpha: got 1.5, expected a number from 0 to 1"),
        (TRAIN, "--temperature_by_type=code=0", "a number above 0"),
        (TRAIN, "--divergence_by_type=code=sideways:k=1", "expected one of forward_kl"),
        (TRAIN, "--divergence=sideways:k=1", "expected one of forward_kl"),
        (TRAIN, "--trackers=tensorbord", "one of mlflow, trackio, wandb, tensorboard, or none alone"),
        (TRAIN, "--trackers=none,tensorboard", "one of mlflow, trackio, wandb, tensorboard, or none alone"),
        (ANNEAL, "--divergence=reverse", "one of forward_kl"),
    ],
)
def test_a_wrong_word_is_refused_with_what_was_expected(face, word, message):
    with pytest.raises(UsageError) as caught:
        read(face, word)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_configuration_file_gives_values_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("grad-accum: 4\nlr: 1e-3\neval_ctx_lens: [512, 1024]\nreset_optim: true\n")
    assert read(ANNEAL, f"--config={path}", "--lr=2e-3") == {
        "grad_accum": 4,
        "lr": 2e-3,
        "eval_ctx_lens": (512, 1024),
        "reset_optim": True,
    }


SOURCES = """
sources:
  lm: {alpha: 0.3, temperature: 1, teacher: null}
  essays: {teacher: gs://b/e, layout: blocks, divergence: forward_kl}
"""


def test_sources_of_a_file_say_how_each_type_is_taught(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SOURCES)
    lm = {"alpha": 0.3, "temperature": 1.0}
    essays = {"teacher": "store:gs://b/e", "layout": "blocks", "divergence": "forward_kl"}
    assert read(TRAIN, f"--config={path}") == {"sources": {"lm": lm, "essays": essays}}
    over = read(TRAIN, f"--config={path}", "--signal=essays=none,lm=online:m")
    assert over == {"sources": {"lm": {**lm, "teacher": "online:m"}, "essays": {**essays, "teacher": "none"}}}


def test_what_of_the_objective_is_a_types_own_goes_over_a_files_sources(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SOURCES + "alpha_by_type: essays=0.2\n")
    words = ["--alpha-by-type=lm=0.6,code=0", "--temperature_by_type=essays=1.3", "--alpha_by_type=maths=1"]
    over = read(TRAIN, f"--config={path}", *words, "--divergence_by_type=lm=jsd:beta=0.3,code=tail_aware:k=5:beta=2")
    assert over["sources"] == {
        "lm": {"alpha": 0.6, "temperature": 1.0, "divergence": "jsd:beta=0.3"},
        "essays": {
            "teacher": "store:gs://b/e",
            "layout": "blocks",
            "divergence": "forward_kl",
            "alpha": 0.2,
            "temperature": 1.3,
        },
        "code": {"alpha": 0.0, "divergence": "tail_aware:k=5:beta=2"},
        "maths": {"alpha": 1.0},
    }


@pytest.mark.parametrize(
    ("lower", "upper", "kept"),
    [
        ("signal: code=a", "--code_logits_dir=b", {"code_logits_dir": "b"}),
        ("code_logits_dir: a", "--signal=code=b", {"sources": {"code": {"teacher": "store:b"}}}),
        ("signal: lm=none", "--lm_teacher_id=m", {"lm_teacher_id": "m"}),
        ("lm_teacher_id: m", "--signal=lm=none", {"sources": {"lm": {"teacher": "none"}}}),
        (
            "{hybrid: false, lm_teacher_id: m}",
            "--signal=lm=none",
            {"hybrid": False, "lm_teacher_id": "m", "sources": {"lm": {"teacher": "none"}}},
        ),
    ],
)
def test_the_command_line_wins_over_a_file_however_a_teacher_is_spelled(tmp_path, lower, upper, kept):
    path = tmp_path / "run.yaml"
    path.write_text(lower)
    assert read(TRAIN, f"--config={path}", upper) == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lm]", "a mapping of types"),
        ("{my type: {}}", "a type's name"),
        ("{lm: gs://b}", "lm: got 'gs://b'"),
        ("{lm: {alpa: 1}}", "lm: unknown key 'alpa'"),
        ("{lm: {alpha: 1.5}}", "lm: alpha: got 1.5"),
        ("{lm: {alpha: yes}}", "lm: alpha: got yes"),
        ("{lm: {temperature: 0}}", "lm: temperature: got 0"),
        ("{lm: {temperature: .inf}}", "lm: temperature: got .inf"),
        ("{lm: {layout: rows}}", "blocks, samples"),
        ("{lm: {divergence: backward}}", "forward_kl"),
        ("{lm: {teacher: 'online:'}}", "expected a URI"),
    ],
)
def test_sources_that_cannot_be_used_are_refused_by_type(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(f"sources: {text}")
    with pytest.raises(UsageError) as caught:
        read(TRAIN, f"--config={path}")
    assert message in str(caught.value)
    assert f"{path}: sources" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("alpha_schedule: 0:30", "0:30"),  # a time of day in YAML 1.1
        ("student: 010", "010"),
        ("dataset_config: 2026-01-02", "2026-01-02"),
        ("student: yes", "yes"),
        ("student: 'null'", "null"),
        ("reset_optim: yes", True),
        ("lr: 1e-3", 1e-3),
        ("lr: 1", 1.0),
    ],
)
def test_a_plain_word_of_a_file_is_what_is_written(tmp_path, line, value):
    path = tmp_path / "run.yaml"
    path.write_text(line)
    assert list(read(ANNEAL, f"--config={path}").values()) == [value]


@pytest.mark.parametrize(
    "text", ["", "# nothing yet\n", "null\n", "run_id: None\n", "sources: {lm: null}\n", "sources:\n"]
)
def test_a_file_with_nothing_in_it_gives_nothing(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert read(TRAIN, f"--config={path}") in ({}, {"sources": {}})


@pytest.mark.parametrize("nothing", ["", "null", "~", "Null", "''", "'  '"])
def test_null_and_blank_mean_not_given(tmp_path, nothing):
    path = tmp_path / "run.yaml"
    path.write_text(f"resume_gcs_uri: {nothing}\nlr: 1\nsources:\n  lm: {{alpha: {nothing}, temperature: 2}}\n")
    assert read(TRAIN, f"--config={path}") == {"lr": 1.0, "sources": {"lm": {"temperature": 2.0}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grad_acum: 4", "Did you mean --grad_accum"),
        ("grad_accum: many", "a whole number"),
        ("- 1", "mapping"),
        ("a: [", "YAML"),
        ("lr: 1\nseed: 2\nlr: 3", "a key is given twice; got lr"),
        ("grad-accum: 1\ngrad_accum: 1", "an option is given twice; got grad-accum and grad_accum"),
        ("lr: {a: 1}", "got a mapping"),
        ("sources: {lm: {alpha: 1}, lm: {alpha: 0}}", "a key is given twice; got lm"),
        ("no_such:", "unknown option --no_such"),
        ("student: [null]", "no empty value in a list"),
        ("eval_ctx_lens: [32, ~]", "no empty value in a list"),
        ('student: "a\\0b"', "without zero bytes"),
    ],
)
def test_a_bad_configuration_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read(ANNEAL, f"--config={path}")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_configuration_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "no.yaml"))):
        read(ANNEAL, f"--config={tmp_path / 'no.yaml'}")


def test_a_date_left_by_a_launcher_is_expanded():
    given = read(ANNEAL, "--output_gcs_uri=gs://bucket/runs/$(date +%Y%m%d-%H%M%S)")
    assert re.fullmatch(r"gs://bucket/runs/\d{8}-\d{6}", given["output_gcs_uri"])
    assert expand_date("no date here $(whoami)") == "no date here $(whoami)"


@given(st.sampled_from(EVERY), st.data())
def test_every_option_reads_its_own_default_back(face, data):
    option = data.draw(st.sampled_from([o for o in options_of(face) if o.default_for(face) not in (None, ())]))
    default = option.default_for(face)
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    assert read(face, f"--{option.name}={text}") == {option.name: default}


def test_no_two_options_of_a_face_set_the_same_value():
    for face in EVERY:
        fields = [(option.group, option.field) for option in options_of(face)]
        assert len(fields) == len(set(fields))
    names = [(option.name, face) for option in OPTIONS for face in option.faces]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "words", [["--json", "RUN"], ["RUN", "--json"], ["--json", "true", "RUN"], ["--json=1", "RUN"]]
)
def test_a_switch_before_a_word_takes_none_that_is_no_value_of_it(words):
    path = Positional("path", "PATH", "a path")
    assert parse((AS_JSON,), words, "liquid x", "", positionals=[path]) == {"json": True, "path": "RUN"}
    off = parse((AS_JSON,), ["--json", "off", "RUN"], "liquid x", "", positionals=[path])
    assert off == {"json": False, "path": "RUN"}


def test_every_command_takes_how_much_it_is_to_say_and_hands_it_on_to_nobody(tmp_path):
    path = Positional("path", "PATH", "a path")
    (tmp_path / "c.yaml").write_text("log_level: debug\n")
    for words, level in (
        ([], None),
        (["--quiet"], "ERROR"),
        (["--no-quiet"], None),
        (["--log-level=warning"], "WARNING"),
        ([f"--config={tmp_path / 'c.yaml'}"], "DEBUG"),
        ([f"--config={tmp_path / 'c.yaml'}", "--log_level=info"], "INFO"),
    ):
        with one_command():
            assert parse((AS_JSON,), [*words, "RUN"], "liquid x", "", positionals=[path]) == {"path": "RUN"}
            assert asked_level() == level
        assert asked_level() is None
    with pytest.raises(UsageError, match="say different things"):
        parse((), ["--quiet", "--log_level=info"], "liquid x", "")
    with pytest.raises(UsageError, match="expected one of debug, info, warning, error"):
        parse((), ["--log_level=loud"], "liquid x", "")
