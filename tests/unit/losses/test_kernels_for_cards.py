"""Triton's kernels become code for real cards, where no card is: its compiler and NVIDIA's assembler come with it.

What they compute is looked at in the interpreter (``test_kernels``, ``test_scan_kernel``). Here it is that each form of
each kernel, in the blocks and warps that it is launched with, has types that agree, fits a card's shared memory and
registers, and spills none of the latter: one that did would still be right, and slow. ``make test-kernels`` runs this.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton's compiler is not here, or its interpreter stands in its place: make test-kernels",
)
CARDS = (80, 90)  # A100; H100 and H200
NUMBER, FLOATS, NARROW, INTS, BYTES, FACTOR = "i32", "*fp32", "*bf16", "*i64", "*u8", "fp32"

# As the wrappers launch them (``triton_passes``): student, teacher and reference student, each with stride and factors.
ROWS = {
    "z_ptr": FLOATS, "z_stride": NUMBER, "z_scale": FACTOR, "z_cap": FACTOR,
    "labels_ptr": INTS, "vocab_size": NUMBER, "inverse_temperature": FACTOR,
    "w_ptr": FLOATS, "w_stride": NUMBER, "w_scale": FACTOR, "w_cap": FACTOR, "shared_size": NUMBER, "mask_ptr": BYTES,
    "r_ptr": FLOATS, "r_stride": NUMBER, "r_scale": FACTOR, "r_cap": FACTOR,
}  # fmt: skip
MEASURE = {**ROWS, "ids_ptr": INTS, "emptied_ptr": BYTES, "num_slots": NUMBER, "out_ptr": FLOATS, "num_rows": NUMBER}
FILL = {**ROWS, "pull": FACTOR, "figures_ptr": FLOATS, "factors_ptr": FLOATS, "num_rows": NUMBER}
PLACE = {"out_ptr": NARROW, "out_stride": NUMBER, "ids_ptr": INTS, "used_ptr": BYTES}
PLACE |= {"values_ptr": FLOATS, "shares_ptr": FLOATS, "slopes_ptr": FLOATS, "num_slots": NUMBER}
SCAN = {"logits": FLOATS, "row_stride": NUMBER, "vocab_size": NUMBER, "peaks": FLOATS, "num_runs": NUMBER}
SCAN |= {"logs": FLOATS}
SWITCHES = ("Z_CAPPED", "W_CAPPED", "R_CAPPED", "HAS_TEACHER", "HAS_MASK", "HAS_REFERENCE", "IS_TEMPERED")


def switches(*on: str) -> dict[str, bool]:
    return {name: name in on for name in SWITCHES}


ONLINE, EVERYTHING = switches("HAS_TEACHER", "IS_TEMPERED"), switches(*SWITCHES)
INTO = {"out_stride": NUMBER}
# Kernel, types of its arguments, constants beside the block.
FORMS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "measure online": ("measure", MEASURE, {**ONLINE, "SLOTS": 0}),
    "measure, stored whole, all there is": ("measure", {**MEASURE, "w_ptr": NARROW}, {**EVERYTHING, "SLOTS": 0}),
    "measure, a tail": ("measure", MEASURE, {**switches("IS_TEMPERED", "HAS_REFERENCE"), "SLOTS": 128}),
    "fill online": ("fill", {**FILL, **INTO, "out_ptr": NARROW}, ONLINE),
    "fill in place, all there is": ("fill", {**FILL, **INTO, "w_ptr": NARROW, "out_ptr": FLOATS}, EVERYTHING),
    "place 1": ("place", PLACE, {"SLOTS": 1}),
    "place 128": ("place", PLACE, {"SLOTS": 128}),
    "scan": ("scan", SCAN, {}),
}


def launched_with(kernel: str, constants: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """All constants, and warps: as the wrappers have them."""
    from liquid_llm.losses.rows.triton_passes import FILLED_BLOCK, MEASURED_BLOCK, _warps
    from liquid_llm.signal_store.codecs.tail.chosen import RUN
    from liquid_llm.signal_store.codecs.tail.scanning import _KERNEL_BLOCK

    if kernel == "scan":
        return {"RUN": RUN, "BLOCK": _KERNEL_BLOCK}, 8
    if kernel == "place":
        return constants, _warps(constants["SLOTS"])
    block = MEASURED_BLOCK if kernel == "measure" else FILLED_BLOCK
    return {**constants, "BLOCK": block}, _warps(block)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("card", CARDS)
def test_each_form_of_a_kernel_is_code_for_a_card_and_spills_nothing(name: str, card: int, tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, rest = FORMS[name]
    place = "signal_store.codecs.tail" if kernel == "scan" else "losses.rows"
    function = getattr(importlib.import_module(f"liquid_llm.{place}.kernels"), kernel)
    constants, warps = launched_with(kernel, rest)
    source = ASTSource(
        fn=function, signature={**types, **dict.fromkeys(constants, "constexpr")}, constexprs=dict(constants)
    )
    made = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
    assert made.metadata.shared <= 48 * 1024
    (tmp_path / "kernel.ptx").write_text(made.asm["ptx"])
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    words = [str(assembler), "-v", f"--gpu-name=sm_{card}{'a' * (card == 90)}", str(tmp_path / "kernel.ptx")]
    said = subprocess.run([*words, "-o", os.devnull], capture_output=True, text=True, check=True).stderr
    found = re.search(r"Used (\d+) registers", said)
    assert found is not None, said
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    assert int(found.group(1)) * 32 * warps <= 65_536, "what a processor of the card has for all its programs"
