"""Whether a student's blocks are compiled, and that a compiled student is the same student.

What is compiled is run by ``aot_eager``: all of torch.compile but the code generator, which takes a minute here. With
that one, too, in ``make soak``.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import tiny_model
from tests.support.tiny import Tiny, build
from torch._dynamo.utils import counters

from liquid_llm.data.loader import collate
from liquid_llm.data.types import MicroBatch
from liquid_llm.errors import ModelError, UsageError
from liquid_llm.losses.objective import Objective
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.models.compiled import INDUCTOR, CompiledBlocks
from liquid_llm.models.heads import blocks_of, evaluating
from liquid_llm.models.lora import LoraSpec, add_adapter
from liquid_llm.models.student import enable_gradient_checkpointing
from liquid_llm.runtime import Choice
from liquid_llm.training import Student
from liquid_llm.wiring import compiling
from liquid_llm.wiring.compiling import Circumstances, choose_compile

# The compiler's own, of what it looks at; a run ignores them while it tries (``compiling._try``).
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

SHAPE = (2, 12)
LONG = Circumstances(torch.device("cuda"), {(8, 1024)}, micro_batches=5000)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(rows: int = SHAPE[0], time: int = SHAPE[1]) -> MicroBatch:
    ids = torch.randint(0, 64, (rows, time), generator=torch.Generator().manual_seed(rows * time))
    return collate("lm", list(ids.numpy()))


def take_pass(student: Student, given: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a micro-batch."""
    student.zero_grad(set_to_none=True)
    with student.passing(given):
        loss = student(given, None, Objective(0.0, 1.0)).loss
        loss.backward()
    found = {name: one.grad.clone() for name, one in student.model.named_parameters() if one.grad is not None}
    return float(loss.detach()), found


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(model: Any, dtype: torch.dtype = torch.float32, backend: str = "aot_eager") -> Student:
    student = Student(model, dtype)
    student.compiled = CompiledBlocks(blocks_of(model), [SHAPE], backend=backend)
    return student


def assert_same_student(plain: Student, other: Student, relative: float = 1e-5) -> None:
    expected, found = take_pass(plain, batch()), take_pass(other, batch())
    assert found[0] == pytest.approx(expected[0], rel=relative)
    assert found[1].keys() == expected[1].keys()
    for name, one in expected[1].items():
        assert (found[1][name] - one).norm() <= relative * one.norm() + 1e-7, name


@pytest.mark.parametrize(
    ("family", "how", "kinds"),
    [
        ("llama", "checkpointing", 1),
        pytest.param("lfm2", "plain", 2, marks=pytest.mark.soak),
        pytest.param("llama", "bfloat16", 1, marks=pytest.mark.soak),
    ],
)
def test_a_compiled_student_is_the_same_and_compiles_each_kind_of_block_once(family: str, how: str, kinds: int) -> None:
    model = tiny_model(family, 64)
    if how == "checkpointing":
        enable_gradient_checkpointing(model)
    model.train()
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    plain, other = Student(copy.deepcopy(model), dtype), compiled(model, dtype)
    before = graphs()
    assert_same_student(plain, other, 1e-2 if how == "bfloat16" else 1e-5)
    assert graphs() - before == kinds, "blocks of a kind share what is compiled"
    assert list(model.state_dict()) == list(plain.model.state_dict())
    assert all("_compiled_call_impl" not in vars(one) for one in copy.deepcopy(model).modules())
    # Other shapes, and what has no backward, never reach the compiler.
    take_pass(other, batch(1))
    take_pass(other, batch(2, 7))
    with evaluating(model):
        other.states(batch())
    assert graphs() - before == kinds
    take_pass(other, batch())
    assert graphs() - before == kinds


def test_a_reference_that_is_the_student_itself_is_asked_in_between() -> None:
    """Without its adapter, uncompiled; what is computed again for backward is compiled again."""
    pytest.importorskip("peft")
    model = tiny_model("llama", 64)
    add_adapter(model, LoraSpec(2, 4.0, "all-linear"), 0)
    enable_gradient_checkpointing(model)
    model.train()
    found = []
    for student in (Student(model, torch.float32, model), Student(model, torch.float32, model)):
        student.compiled = CompiledBlocks(blocks_of(model), [SHAPE], backend="aot_eager") if found else None
        student.zero_grad(set_to_none=True)
        with student.passing(batch()):
            loss = student(batch(), None, Objective(0.0, 1.0, 0.5)).loss
            loss.backward()
        found.append((float(loss.detach()), [one.grad.norm() for one in model.parameters() if one.grad is not None]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "lfm2", "gpt2"])
def test_the_same_by_the_code_generator(family: str) -> None:
    dropout = ("resid_pdrop", "embd_pdrop", "attn_pdrop") if family == "gpt2" else ()  # of which a run has none
    model = tiny_model(family, 64, **dict.fromkeys(dropout, 0.0)).train()
    assert_same_student(Student(copy.deepcopy(model), torch.float32), compiled(model, backend=INDUCTOR), 1e-4)


@pytest.mark.parametrize(
    ("changes", "value", "words"),
    [
        ({}, "true", "8 x 1024"),
        ({"device": torch.device("cpu")}, "false", "on a CPU"),
        ({"device": torch.device("mps")}, "false", "mps"),
        ({"shapes": ()}, "false", "no texts are joined"),
        ({"micro_batches": 999}, "false", "999 micro-batches are left"),
        ({"deterministic": True}, "false", "--deterministic"),
        ({"dealt_out": True}, "false", "dealt out"),
        ({"before": False}, "false", "as the run began"),
        ({"before": True, "micro_batches": 3}, "true", "as the run began"),
        ({"before": True, "dealt_out": True}, "false", "dealt out"),
    ],
)
def test_what_auto_comes_to_has_a_reason(changes: dict[str, Any], value: str, words: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    found = choose_compile("auto", Circumstances(**{**vars(LONG), **changes}))
    assert found.value == value
    assert words in found.reason


def test_auto_does_without_where_triton_is_not(monkeypatch: Any) -> None:
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert choose_compile("auto", LONG) == Choice("false", "triton is not installed")
    assert choose_compile(True, LONG) == Choice("true", "requested")


@pytest.mark.parametrize("changes", [{"shapes": ()}, {"dealt_out": True}, {"deterministic": True}])
def test_what_cannot_be_compiled_is_refused_where_it_is_asked_for(changes: dict[str, Any]) -> None:
    case = Circumstances(**{**vars(LONG), **changes})
    with pytest.raises(UsageError, match="--compile=true"):
        choose_compile(True, case)
    assert choose_compile(False, case) == Choice("false", "requested")


@pytest.mark.parametrize("must", [False, True])
def test_a_failed_trial_leaves_the_student_as_it_was(must: bool, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "of no such name")
    student = Student(tiny_model("llama", 64).train(), torch.float32)
    blanks = [compiling._blank(SHAPE, documents=False)]
    if must:
        with pytest.raises(ModelError, match="of no such name"):
            compiling._compile(student, blanks, Choice("true", "requested"), must=True)
    else:
        choice = compiling._compile(student, blanks, Choice("true", "many launches"), must=False)
        assert choice.value == "false"
        assert "of no such name" in choice.reason
        assert "a trial failed" in caplog.text
    assert student.compiled is None
    assert take_pass(student, batch())[0] > 0


def test_more_kinds_of_a_block_than_torch_compiles_fail_the_trial(monkeypatch: Any) -> None:
    """Or the run would say that its blocks are compiled, and they were not."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    student = Student(tiny_model("llama", 64).train(), torch.float32)
    blanks = [compiling._blank(shape, documents=False) for shape in (SHAPE, (2, 7))]
    with torch._dynamo.config.patch(recompile_limit=1):
        choice = compiling._compile(student, blanks, Choice("true", "many launches"), must=False)
    assert (choice.value, student.compiled) == ("false", None)
    assert "fail_on_recompile_limit_hit" in choice.reason


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


def test_a_compiled_run_says_so_continues_to_the_bit_and_warns_of_a_change(
    tiny: Tiny, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")  # traced, and run as it was: a run compiles twice here
    given = {"document_mask": "true", "max_steps": 3, "save_every": 2, "lr": 1e-3, "hybrid": "false"}
    plain, whole, parts, changed = (tmp_path / name for name in ("plain", "whole", "parts", "changed"))
    assert tiny.train_plainly(plain, **given) == 0
    assert tiny.train_plainly(whole, compile="true", **given) == 0
    for place in (parts, changed):  # what a run leaves that was killed after step 2
        shutil.copytree(whole, place)
        for name in ("last", "best", "final", "step-00000003"):
            for file in (place / "run").glob(f"{name}.*"):
                file.unlink()
        shutil.rmtree(place / "run" / "student")
    assert tiny.train_plainly(parts, compile="true", **given) == 0
    assert tiny.train_plainly(changed, compile="false", **given) == 0
    rows = [list(map(without_timings, read_metrics(one / "run"))) for one in (whole, parts, plain)]
    assert rows[0] == rows[1], "continued to the bit"
    losses = [[row["loss"] for row in those if row["kind"] == "train"] for those in rows]
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[0][:1] == pytest.approx(losses[2][:1], rel=1e-6)
    said = [(place / "run" / "log.txt").read_text() for place in (whole, parts, changed)]
    assert "compile true: requested; compiled in" in said[0]
    assert ["rounds in another way" in one for one in said] == [False, False, True]
    weights = [torch.load(one / "run" / "final.pt", weights_only=True)["student"] for one in (whole, plain)]
    assert list(weights[0]) == list(weights[1]), "a checkpoint does not tell"


def test_what_is_asked_for_in_vain_is_refused(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    """Whole samples have lengths of their own: nothing would be compiled."""
    tiny.draw_from({"path": "code.jsonl", "type": "code", "weight": 1.0})
    assert tiny.train_plainly(tmp_path, compile="true", hybrid="false", max_steps=1) == 2
    assert "no micro-batch has a fixed shape" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.pt").exists()
