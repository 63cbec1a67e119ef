"""Which teachers a run gets from its configuration and its data, and what is refused in words."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tests.support.models import tiny_model
from tests.support.teachers import IDENTITY, ListSource, make_samples
from tests.support.tiny import VOCAB_SIZE, Tiny, build

from liquid_llm.capture.job import capture
from liquid_llm.checkpoint.resume import ResumeSource
from liquid_llm.config import RunConfig, build_run_config
from liquid_llm.data.loader import WeightedDataset
from liquid_llm.errors import LiquidError, SignalError, UsageError
from liquid_llm.framing import Framing, Framings
from liquid_llm.models.loading import load_teacher, load_tokenizer
from liquid_llm.options import ANNEAL, TRAIN
from liquid_llm.signal_store.codecs import get_codec
from liquid_llm.signal_store.store import StoreWriter
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.stored import StoredTeacher
from liquid_llm.teachers.teacher import Coverage, TeacherSetup
from liquid_llm.wiring.inputs import Inputs
from liquid_llm.wiring.shapes import describe_models
from liquid_llm.wiring.start import Start
from liquid_llm.wiring.teachers import LOW_COVERAGE, RunTeachers, _low_coverage, make_teacher, make_teachers
from liquid_llm.wiring.tokenizers import TextTools

CPU = torch.device("cpu")


class Typed(ListSource):
    """Samples with the type that a dataset of tokens has."""

    def __init__(self, type: str) -> None:
        super().__init__(make_samples(4, type=type, low=5, high=20, prefix=type))
        self.type = type


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"), teacher_steps=0)


@pytest.fixture(scope="module")
def text(tiny: Tiny) -> TextTools:
    return TextTools.of(load_tokenizer(str(tiny.teacher)), Framings(Framing(None, 0)))


@pytest.fixture(scope="module")
def store(tiny: Tiny, text: TextTools) -> Path:
    """Signal of the maths samples, in draws that are read at one temperature alone."""
    loaded = load_teacher(str(tiny.teacher), dtype=torch.float32, device=CPU)
    writer = StoreWriter(
        str(tiny.root / "maths"),
        loaded.identity,
        get_codec("sampled", options={"temperature": 2.0}),
        vocab_size=text.vocab_size,
    )
    maths = Typed("math_tool")
    capture({"math_tool": [maths]}, {"math_tool": writer}, loaded, seq_len=32, batch_size=2)
    return tiny.root / "maths"


def teachers_of(config: RunConfig, text: TextTools, *types: str) -> RunTeachers:
    return make_teachers(config, Inputs([WeightedDataset(Typed(type), 1.0) for type in types], {}), text, CPU, None)


def hybrid(**given: object) -> RunConfig:
    return build_run_config(TRAIN, {"dataset_manifest": "m", "block_size": 64, **given})


def test_each_type_gets_the_teacher_that_is_named_for_it(
    tiny: Tiny, text: TextTools, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {"code": {"teacher": f"online:{tiny.teacher}"}}
    config = hybrid(lm_teacher_id=str(tiny.teacher), math_logits_dir=str(store), sources=sources, kd_temperature=2.0)
    with caplog.at_level(logging.INFO):
        made = teachers_of(config, text, "lm", "math_tool", "code")
    assert list(made.router) == ["lm", "math_tool", "code"]
    assert isinstance(made.router["math_tool"], StoredTeacher)
    assert isinstance(made.router["lm"], OnlineTeacher)
    assert made.router["lm"] is made.router["code"]  # one model for both
    assert len(made.models) == 1
    assert sum(one.getMessage().startswith("teacher ") for one in caplog.records) == 1  # opened once
    assert set(made.choices) == {"teacher_dtype", "attention"}
    assert made.identities["online"]["types"] == ["lm", "code"]
    assert made.identities["math_tool"]["uri"] == str(store)
    assert made.coverage["math_tool"].usable == 4
    assert "math_tool: its teacher cannot be asked at T=1" in caplog.text


def test_the_name_that_stores_must_have_does_not_open_a_model_twice(tiny: Tiny, text: TextTools) -> None:
    sources = {"code": {"teacher": f"online:{tiny.teacher}"}}
    config = hybrid(lm_teacher_id=str(tiny.teacher), mc_teacher_id=str(tiny.teacher), sources=sources)
    made = teachers_of(config, text, "lm", "code")
    assert made.router["lm"] is made.router["code"]


def test_without_a_teacher_there_is_an_empty_table_and_a_word_about_it(
    text: TextTools, caplog: pytest.LogCaptureFixture
) -> None:
    config = build_run_config(ANNEAL, {"dataset_name": "d", "block_size": 64})
    assert not teachers_of(config, text, "lm").router
    with_none = hybrid(mc_teacher_id="t", sources={"code": {"teacher": "none"}})
    assert not teachers_of(with_none, text, "lm", "code").router
    assert "no teacher is named: plain cross-entropy" in caplog.text


@pytest.mark.parametrize(
    ("type", "named"),
    [("code", ("--code_logits_dir=URI or --signal code=URI", "--signal code=none")), ("chat", ("--signal chat=URI",))],
)
def test_a_type_beside_plain_text_is_not_left_without_a_teacher_in_silence(
    tiny: Tiny, text: TextTools, type: str, named: tuple[str, ...]
) -> None:
    config = hybrid(lm_teacher_id=str(tiny.teacher), mc_teacher_id="t", math_logits_dir="x")
    with pytest.raises(UsageError, match=f"the manifest has {type} samples but nothing names their signal") as failure:
        teachers_of(config, text, "lm", type)
    for words in named:
        assert words in str(failure.value)


def test_a_temperature_that_a_teacher_cannot_be_asked_at_is_refused_before_the_run(
    tiny: Tiny, text: TextTools, store: Path
) -> None:
    at_four = hybrid(lm_teacher_id=str(tiny.teacher), math_logits_dir=str(store), kd_temperature=4.0)
    with pytest.raises(SignalError, match="the teacher of math_tool cannot answer at this temperature; got 4"):
        teachers_of(at_four, text, "lm", "math_tool")
    own = {"math_tool": {"temperature": 2.0}}
    config = hybrid(lm_teacher_id=str(tiny.teacher), math_logits_dir=str(store), kd_temperature=4.0, sources=own)
    assert set(teachers_of(config, text, "lm", "math_tool").router) == {"lm", "math_tool"}


@pytest.mark.parametrize(
    ("schedule", "refused"), [("0:2,50:2", None), ("50:2", "1"), ("0:2,50:4", "4"), ("0:2,50:2.5", "2.5")]
)
def test_every_temperature_of_a_schedule_is_looked_at(
    tiny: Tiny, text: TextTools, store: Path, schedule: str, refused: str | None
) -> None:
    """The store is read at 2 alone; the level itself counts until the first entry."""
    source = {"lm": {"teacher": f"store:{store}", "layout": "samples"}}
    given = {"dataset_name": "d", "block_size": 64, "T": 1.0, "temp_schedule": schedule, "sources": source}
    config = build_run_config(ANNEAL, given)
    expected = (
        "no sample of this run has usable stored signal" if refused is None else f"at this temperature; got {refused};"
    )
    with pytest.raises(LiquidError, match=expected):  # there is maths in it, no plain text
        teachers_of(config, text, "lm")


def test_a_kind_that_nobody_registered_is_refused_with_those_that_are(tmp_path: Path) -> None:
    setup = TeacherSetup(None, IDENTITY.tokenizer_hash, VOCAB_SIZE, 64, CPU, tmp_path)
    with pytest.raises(UsageError, match=r"unknown kind of teacher; got 'oracle:x'; expected online:\.\.\. or store:"):
        make_teacher("oracle:x", setup)


def test_a_teacher_that_cannot_see_so_long_a_context_is_refused(tiny: Tiny, text: TextTools) -> None:
    config = hybrid(lm_teacher_id=str(tiny.teacher), mc_teacher_id="t", block_size=257)
    with pytest.raises(UsageError, match=r"cannot see so long a context.*got 257; expected at most 256"):
        teachers_of(config, text, "lm")


def test_of_two_online_teachers_the_larger_is_worked_out_and_the_other_is_held(tiny: Tiny, text: TextTools) -> None:
    small = tiny.root / "small"
    model = tiny_model("gpt2", VOCAB_SIZE, n_layer=1)
    model.save_pretrained(small)
    text.tokenizer.save_pretrained(small)
    config = hybrid(
        lm_teacher_id=str(small),
        mc_teacher_id="t",
        student="llama-test",
        sources={"code": {"teacher": f"online:{tiny.teacher}"}},
    )
    found = describe_models(config, Start("fresh", ResumeSource({}, "")), text, CPU, None)
    assert found.teacher is not None
    assert found.teacher.config["model_type"] == "llama"
    assert found.held_bytes == 4 * sum(one.numel() for one in model.parameters())
    one = hybrid(lm_teacher_id=str(tiny.teacher), mc_teacher_id="t", student="llama-test", math_logits_dir="x")
    assert describe_models(one, Start("fresh", ResumeSource({}, "")), text, CPU, None).held_bytes == 0


@pytest.mark.parametrize(
    ("usable", "strict", "told"), [(1.0, True, ""), (0.5, False, "about 50% of its"), (0.5, True, "0.4% of")]
)
def test_a_low_coverage_is_said_with_what_follows_from_it(usable: float, strict: bool, told: str) -> None:
    config = hybrid(mc_teacher_id="t", lm_teacher_id="t", hybrid_strict=strict, batch_size=8)
    row = Coverage("x", 100, 100, 64, {"usable": int(64 * usable)}, {})
    said = _low_coverage(config, "code", row)
    assert told in said
    assert bool(said) == (usable < LOW_COVERAGE)
