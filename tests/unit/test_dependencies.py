"""What the project imports is what pyproject.toml declares."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.sources import imports, is_standard_library, module_files, parse

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
OURS = ("liquid_llm", "trainer", "stage1_hybrid")
PACKAGES = {
    "yaml": "pyyaml",
    "google": "google-auth",
    "huggingface_hub": "huggingface-hub",
}  # where module and package differ
# module -> extra and package, which some commands and options ask for
EXTRAS = {
    "lm_eval": ("lm-eval", "lm-eval"),
    "mlflow": ("track", "mlflow-skinny"),
    "peft": ("lora", "peft"),
    "torchao": ("torchao", "torchao"),
    "trackio": ("track", "trackio"),
    "wandb": ("track", "wandb"),
}
# What torch itself brings where it can be of use, and who alone imports it, when it is needed.
BROUGHT = {
    "triton": {
        "liquid_llm.losses.rows.kernels",
        "liquid_llm.losses.rows.triton_passes",
        "liquid_llm.signal_store.codecs.tail.kernels",
    }
}
NOT_IMPORTED = {
    "tensorboard": "torch.utils.tensorboard writes event files with it",
}


def declared() -> set[str]:
    """Names of ``[project] dependencies`` (Python 3.10 has no reader for the format)."""
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", PYPROJECT.read_text(encoding="utf-8"), re.M | re.S)
    return {re.split(r"[\[<>=~! ]", line.strip().strip('",'), maxsplit=1)[0] for line in block.splitlines()}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    found = [one for name, path in module_files().items() for one in imports(name, parse(path), set())]
    modules = {one.name.partition(".")[0] for one in found}
    foreign = (
        {name for name in modules if name not in OURS and not is_standard_library(name)}
        - EXTRAS.keys()
        - BROUGHT.keys()
    )
    packages = {PACKAGES.get(name, name) for name in foreign}
    assert packages - declared() == set(), "imported and not declared"
    assert declared() - packages - NOT_IMPORTED.keys() == set(), "declared and not imported"
    assert declared() >= NOT_IMPORTED.keys()


def test_an_extra_is_declared_and_never_needed_to_import_a_module() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    found = [one for name, path in module_files().items() for one in imports(name, parse(path), set())]
    for module, (extra, package) in EXTRAS.items():
        assert re.search(rf'^{extra} = \[.*"{package}[>=]', text, re.M)
        used = [one for one in found if one.name.partition(".")[0] == module]
        assert used
        assert not [one for one in used if one.at_import_time]


def test_what_torch_brings_is_imported_where_it_is_needed_alone() -> None:
    files = module_files()
    for package, owners in BROUGHT.items():
        of = {
            name: [
                one.at_import_time for one in imports(name, parse(path), set()) if one.name.partition(".")[0] == package
            ]
            for name, path in files.items()
        }
        assert {name for name, found in of.items() if found} == owners
        uses = [
            (name, one)
            for name, path in files.items()
            for one in imports(name, parse(path), set(files))
            if one.name in owners and name not in owners
        ]
        assert uses
        assert not [name for name, one in uses if one.at_import_time]
