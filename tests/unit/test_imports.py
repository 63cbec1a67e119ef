"""Imports go one way, and importing does nothing.

    faces -> cli -> demo -> jobs -> wiring -> config, terminal -> parts -> leaves

A module may import from layers below its own and from its own package. Parts know each other only where KNOWN_PARTS
says so. Only the storage seam knows fsspec. Answering ``--help`` needs the standard library alone.
"""

from __future__ import annotations

import ast
import graphlib

import pytest
from tests.support.sources import (
    Import,
    import_effects,
    imported_at_start,
    imports,
    is_standard_library,
    module_files,
    parse,
)

FILES = module_files()
FACES = ("trainer.entrypoint", "stage1_hybrid.cli", "stage1_hybrid.precompute_hybrid_logits")

# What is not named here is a part. ``data.types`` is a leaf: the words of the data side, nothing else.
LAYERS = (
    {
        "errors",
        "options",
        "schedules",
        "selection",
        "losses",
        "storage",
        "runtime",
        "masking",
        "formatting",
        "versions",
        "framing",
        "parsing",
        "device",
        "passes",
        "identity",
        "registry",
        "sources",
        "distributed",
        "sharding",
        "optimizers",
        "step_sums",
        "streams",
        "unread",
        "verbosity",
        "weight_files",
        "data.types",
    },
    set(),  # parts
    {"config", "terminal"},
    {"wiring"},
    {"jobs"},
    {"demo"},
    {"cli"},
    {"trainer", "stage1_hybrid", "__main__", "api"},
)
PARTS = 1

# The parts that may import another part, and which. A store knows no model, and nobody asks it but the stored teacher
# and the jobs that fill and read it; the data side knows nothing of how raw data became it.
KNOWN_PARTS: dict[str, set[str]] = {
    "training": {"models"},
    "metrics": {"trackers"},
    "report": {"metrics"},
    "preparation": {"data"},
    "teachers": {"models", "signal_store"},
    "capture": {"data", "models", "served", "signal_store", "teachers"},
    "evaluation": {"teachers", "training"},
    "generation": {"models"},
    "answers": {"data", "generation"},
    "lm_eval_tasks": {"generation"},
    "study": {"metrics", "report"},
    "memory": {"capture", "evaluation", "models", "signal_store", "teachers", "training"},
}

# Imports that break the rule and are to go: (importer, imported).
DEBTS: set[tuple[str, str]] = set()


def component(module: str) -> str:
    """The piece of the project a module belongs to: ``liquid_llm.data.blocks`` -> ``data``."""
    inside = module.removeprefix("liquid_llm.")
    if inside == "data.types":
        return inside
    first = inside.split(".")[0]
    return next((one for one in ("config", "distributed") if first.startswith(f"{one}_")), first)


def layer(module: str) -> int:
    name = component(module)
    return next((height for height, names in enumerate(LAYERS) if name in names), PARTS)


def refusal(importer: str, imported: str) -> str | None:
    """Why ``importer`` may not import ``imported``; None when it may."""
    if imported == "liquid_llm" or component(importer) == component(imported) or layer(imported) < layer(importer):
        return None
    if layer(importer) == layer(imported) == 0:
        return None
    if layer(importer) == layer(imported) == PARTS and component(imported) in KNOWN_PARTS.get(
        component(importer), set()
    ):
        return None
    return f"{importer} (layer {layer(importer)}) may not import {imported} (layer {layer(imported)})"


def own_imports(module: str) -> list[Import]:
    ours = ("liquid_llm", "trainer", "stage1_hybrid")
    found = imports(module, parse(FILES[module]), set(FILES))
    return [entry for entry in found if entry.name.split(".")[0] in ours]


def test_imports_go_one_way() -> None:
    found = [(module, entry) for module in FILES for entry in own_imports(module)]
    broken = {
        (module, entry.name): f"line {entry.line}: {why}"
        for module, entry in found
        if (why := refusal(module, entry.name))
    }
    assert not [why for pair, why in broken.items() if pair not in DEBTS]
    assert broken.keys() >= DEBTS, "a debt that is paid is struck off"


def test_the_rule_refuses_what_it_should() -> None:
    assert refusal("liquid_llm.losses.fused", "liquid_llm.training")
    assert refusal("liquid_llm.data.loader", "liquid_llm.config")
    assert refusal("liquid_llm.data.loader", "liquid_llm.report")
    assert refusal("liquid_llm.jobs.train", "liquid_llm.cli.main")
    assert refusal("liquid_llm.cli.main", "trainer.entrypoint")
    assert refusal("trainer.entrypoint", "liquid_llm.cli.main") is None
    assert refusal("liquid_llm.data.loader", "liquid_llm.storage.local") is None


def test_parts_that_know_each_other_form_no_circle() -> None:
    order = list(graphlib.TopologicalSorter(KNOWN_PARTS).static_order())
    assert set(KNOWN_PARTS) <= set(order)


def test_allowed_acquaintances_are_needed() -> None:
    used = {(component(module), component(entry.name)) for module in FILES for entry in own_imports(module)}
    allowed = {(part, known) for part, those in KNOWN_PARTS.items() for known in those}
    assert not allowed - used


def face_branches(module: str) -> list[str]:
    """Where a module compares a face, or knows the name of one."""
    found = []
    for node in ast.walk(parse(FILES[module])):
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            seen = "face" in {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
        elif isinstance(node, ast.ImportFrom) and node.module == "liquid_llm.options":
            seen = not {"ANNEAL", "TRAIN", "CAPTURE", "PREPARE"}.isdisjoint(name.name for name in node.names)
        else:
            continue
        found += [f"{module}:{node.lineno}"] if seen else []
    return found


def test_what_a_face_stands_for_is_decided_in_configuration_alone() -> None:
    """Jobs and parts ask the configuration for what it can do; faces, commands and the demo name which they are."""
    allowed = {"config", "options", "cli", "demo", "trainer", "stage1_hybrid"}
    assert not [where for module in FILES if component(module) not in allowed for where in face_branches(module)]
    assert face_branches("liquid_llm.config"), "or the rule sees nothing"


SEAMS = {("storage",): {"fsspec", "gcsfs", "aiohttp"}, ("distributed", "sharding"): {"torch.distributed"}}
"""Packages that these components alone may import. What ranks say to one another is ``distributed``'s, how a model
lies among them ``sharding``'s."""


def test_seams_are_the_only_ones_that_know_what_is_behind_them() -> None:
    for owners, behind in SEAMS.items():
        others = [module for module in FILES if component(module) not in owners]
        found = {
            (module, entry.name) for module in others for entry in imports(module, parse(FILES[module]), set(FILES))
        }
        assert not {(m, name) for m, name in found if any(f"{name}.".startswith(f"{seam}.") for seam in behind)}


@pytest.mark.parametrize("module", [*FACES, "liquid_llm.cli.main"])
def test_help_needs_the_standard_library_alone(module: str) -> None:
    reached = imported_at_start(module, FILES)
    heavy = {name: by for name, by in reached.items() if name not in FILES and not is_standard_library(name)}
    assert not heavy, "imported before the options are parsed"


def test_what_comes_in_at_start_is_followed_through_our_modules() -> None:
    reached = imported_at_start("liquid_llm.losses.signals", FILES)
    assert reached["torch"] == "liquid_llm.losses.signals"
    assert "liquid_llm.losses" in reached


def test_importing_a_module_only_defines_names() -> None:
    assert not {module: effects for module, path in FILES.items() if (effects := import_effects(parse(path)))}


def test_effects_at_import_are_seen() -> None:
    assert not [code for code in EFFECTS if not import_effects(ast.parse(code))]


def test_quiet_modules_are_left_alone() -> None:
    assert not [code for code in QUIET if import_effects(ast.parse(code))]


EFFECTS = [
    "import os\nhome = os.environ['HOME']",
    "import os\nclass A:\n    home = os.getenv('HOME')",
    "from os import environ\nhome = environ.get('HOME')",
    "import os\ndef f(home=os.environ.get('HOME')): ...",
    "import os\nos.environ['A'] = '1'",
    "import logging\nlogging.basicConfig()",
    "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True",
    "import torch\nHAS_CUDA = torch.cuda.is_available()",
    "from pathlib import Path\nTEXT = Path('x').read_text()",
    "from datasets import load_dataset\nDATA = load_dataset('x')",
    "import warnings\nwarnings.filterwarnings('ignore')",
    "for name in 'ab':\n    print(name)",
    "import subprocess\nHEAD = subprocess.run(['git'])",
    "try:\n    import sys\n    sys.path.insert(0, '.')\nexcept ImportError:\n    pass",
]
QUIET = [
    "import logging\nlogger = logging.getLogger(__name__)",
    "import os\ndef home():\n    return os.environ['HOME']",
    "import re\nWORD = re.compile('a')\nTABLE = {word: len(word) for word in ('a', 'b')}",
    "import sys\nif __name__ == '__main__':\n    sys.exit(print('hello'))",
    "import os\nHOME = lambda: os.environ['HOME']",
    '"""Words."""\nfrom dataclasses import dataclass\n\n@dataclass\nclass A:\n    """Words."""\n    x: int = 1',
]


def test_imports_inside_functions_and_for_types_are_told_apart() -> None:
    code = (
        "from typing import TYPE_CHECKING\nimport json\nif TYPE_CHECKING:\n    import torch\n"
        "def f():\n    import numpy\nfrom liquid_llm import storage\n"
    )
    found = {entry.name: entry.at_import_time for entry in imports("m", ast.parse(code), {"liquid_llm.storage"})}
    assert found == {"typing": True, "json": True, "numpy": False, "liquid_llm.storage": True}
