"""examples/notebook: its cells in their order, in a folder where the demo was; only the sizes are small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.readme import REPOSITORY
from tests.support.tiny import Tiny

pytestmark = pytest.mark.slow
NOTEBOOK = REPOSITORY / "examples" / "notebook" / "liquid_llm.ipynb"


def cells() -> list[dict[str, Any]]:
    read = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (read["nbformat"], read["nbformat_minor"]) == (4, 5)
    return list(read["cells"])


def test_it_is_kept_without_what_it_printed() -> None:
    """So that a change of it can be read; and its cells have names of their own, as the format wants."""
    assert not [cell["id"] for cell in cells() if cell.get("outputs") or cell.get("execution_count")]
    names = [cell["id"] for cell in cells()]
    assert len(set(names)) == len(names)


def test_its_cells_run(
    demo_folder: Path, scored: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)  # agg has no window, and warns of that
    known: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells():
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}: {cell['id']}", "exec"), known)
        if cell["id"] == "settings":
            assert {"STUDENT", "BLOCK_SIZE", "STEPS"} <= known.keys()
            known |= {"STUDENT": str(scored.student), "BLOCK_SIZE": 64, "STEPS": 2}
    shown = capsys.readouterr().out
    assert known["fused"].loss.item() == pytest.approx(known["plain"].loss.item(), rel=1e-5)
    assert known["divergences"][-1] < known["divergences"][0] / 2
    assert [line.split()[0] for line in shown.splitlines() if "bytes a position" in line] == [
        "tail",
        "full",
        "topk",
        "sampled",
    ]
    assert set(known["table"]["type"]) == {"math_tool"}
    assert known["run"].folder == Path("runs/notebook/first")
    lines = [line.get_label() for line in known["axes"].get_lines()]
    assert lines == ["training text", "held-out text"]
    plt.close(known["figure"])
