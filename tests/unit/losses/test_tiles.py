"""Products through a processor's bfloat16 tiles (AMX), which the other tests do without: the same on every machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.support import forked

HERE = Path(__file__).parent


def there_are_tiles() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and bool(probe())


@pytest.mark.skipif(not there_are_tiles(), reason="this processor has no bfloat16 tiles, or they are hidden")
def test_what_is_said_of_products_and_gradients_holds_with_tiles() -> None:
    """The tests of products and of float64's gradients, in a process that may use tiles."""
    files = [str(HERE / name) for name in ("test_products.py", "test_bfloat16.py", "test_plan.py")]
    # Plain: what pytest would rewrite is there already in a process that is forked.
    words = [*files, "-q", "-p", "no:cacheprovider", "-k", "tiles and not SmolLM2", "--assert=plain"]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "DEFAULT"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = forked.run(["-m", "pytest", *words], env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.splitlines()[0].count(".") > 20, done.stdout


@pytest.mark.skipif(not there_are_tiles(), reason="this processor has no bfloat16 tiles, or they are hidden")
def test_tiles_are_at_work() -> None:
    """Else the test above would look at the same products as all others."""
    script = (
        "import torch\n"
        "from liquid_llm.losses.plan import bfloat16_tiles\n"
        "one = torch.full((64, 64), 1 + 2**-12)\n"
        "with bfloat16_tiles():\n"
        "    print(float((one @ one).max()))"
    )
    for newest, expected in (("DEFAULT", 64.0), ("AVX512_CORE_BF16", 64 * (1 + 2**-12) ** 2)):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": newest}
        done = forked.run(["-c", script], env=environment, check=True)
        assert float(done.stdout) == pytest.approx(expected, rel=1e-7)
