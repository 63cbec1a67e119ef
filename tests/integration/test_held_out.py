"""KL from the teacher compares between codecs: of held-out samples every store has the signal nearly whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.annealing import rows
from tests.support.tiny import Tiny, build

from liquid_llm.cli.main import main
from liquid_llm.data.tokens import is_held_out
from liquid_llm.signal_store.description import HELD_OUT
from liquid_llm.signal_store.store import open_store

pytestmark = pytest.mark.slow
CODECS = {"full": {}, "tail": {"codec_options": "draws_t1=2,draws_t2=2,draws_t4=1"}, "topk": {"topk": 4}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Code alone."""
    made = build(tmp_path_factory.mktemp("tiny"))
    made.draw_from({"path": "code.jsonl", "type": "code", "weight": 1.0})
    return made


def capture(tiny: Tiny, store: Path, codec: str, **options: Any) -> int:
    asked = {"math_logits_dir": None, "code_logits_dir": store, "codec": codec, **CODECS[codec], **options}
    return main(["capture", *tiny.capture_words(**asked)])


@pytest.fixture(scope="module")
def stores(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    for codec in CODECS:
        assert capture(tiny, root / codec, codec) == 0
    return {codec: root / codec for codec in CODECS}


def evaluate(tiny: Tiny, store: Path, output: Path, share: float = 0.2) -> dict[str, Any]:
    """The first evaluation of a run: of one and the same student."""
    named = {"code_logits_dir": store, "val_fraction": share, "eval_every": 1, "max_steps": 1, "warmup_steps": 0}
    assert tiny.train_plainly(output, **named, save_every=0) == 0
    return rows(output / "run", "eval")[0]


def test_of_all_codecs_one_figure(tiny: Tiny, stores: dict[str, Path], tmp_path: Path) -> None:
    assert not (stores["full"] / HELD_OUT).exists(), "it says all by itself"
    for codec in ("tail", "topk"):
        held = open_store(str(stores[codec] / HELD_OUT))
        names = {name for name, _ in held.layout.records()}
        assert names == {f"code-{n}" for n in range(40) if is_held_out(f"code-{n}", 0.05)}
        held.close()
        assert len(names) > 0
    found = {codec: evaluate(tiny, store, tmp_path / codec) for codec, store in stores.items()}
    told = {codec: row["by_type"]["code"]["val_kd_codec"] for codec, row in found.items()}
    assert told == {"full": "full", "tail": "held_out:tail", "topk": "held_out:tail"}
    assert {codec: row["val_kd_codec"] for codec, row in found.items()} == told
    assert found["tail"]["val_kd"] == found["topk"]["val_kd"]
    bare = tmp_path / "bare"
    for codec in ("tail", "topk"):
        shutil.copytree(stores[codec], bare / codec, ignore=shutil.ignore_patterns(HELD_OUT))
        found[f"bare {codec}"] = evaluate(tiny, bare / codec, tmp_path / f"bare-{codec}")
        assert found[f"bare {codec}"]["val_kd_codec"] == codec
    assert found["bare topk"]["val_kd"] != pytest.approx(found["bare tail"]["val_kd"], rel=0.2)
    # Held out are now the very samples that are stored for it: what all of the teacher says of them is the yardstick.
    exact, nearly = (evaluate(tiny, stores[one], tmp_path / f"few-{one}", 0.05)["val_kd"] for one in ("full", "topk"))
    assert nearly == pytest.approx(exact, rel=0.03)
    assert nearly == pytest.approx(found["topk"]["val_kd"], rel=1e-6), "of the same samples, however many are held out"


def test_a_second_capture_adds_nothing_and_a_packed_store_has_them_too(
    tiny: Tiny, stores: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (stores["topk"] / HELD_OUT).iterdir()}
    assert capture(tiny, stores["topk"], "topk") == 0
    assert {path: path.read_bytes() for path in (stores["topk"] / HELD_OUT).iterdir()} == before
    assert main(["store", "pack", str(stores["topk"]), str(tmp_path / "packed")]) == 0
    capsys.readouterr()
    assert main(["inspect", "--json", str(tmp_path / "packed")]) == 0
    assert json.loads(capsys.readouterr().out)["held_out"]["codec"] == "tail"
    assert main(["doctor", str(tmp_path / "packed")]) == 0
    shard = next((tmp_path / "packed" / HELD_OUT).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert main(["doctor", str(tmp_path / "packed")]) == 3
    assert capture(tiny, tmp_path / "none", "topk", held_out_tokens=0) == 0
    assert not (tmp_path / "none" / HELD_OUT).exists()
