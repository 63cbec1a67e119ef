"""Which files of a Hugging Face folder hold its weights (leaf)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from liquid_llm import storage
from liquid_llm.errors import LiquidError
from liquid_llm.parsing import parse_json

_WHOLE = ("model.safetensors", "pytorch_model.bin")


def find_weight_files(folder: Path, names: Collection[str], where: str, problem: type[LiquidError]) -> list[str] | None:
    """The first of what transformers looks for: one file, or the shards an index names; None where there is neither.

    Args:
        names: of the files in ``folder``.
        where: what the folder is called in messages.
        problem: raised for an index that cannot be read, or that names what is not there.
    """
    for whole in _WHOLE:
        if whole in names:
            return [whole]
        if (index := f"{whole}.index.json") in names:
            try:
                shards = sorted(set(parse_json(storage.read_small(str(folder / index)))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise problem("this index of shards cannot be read", where=f"{where}/{index}") from error
            if missing := [str(shard) for shard in shards if shard not in names]:
                raise problem(
                    "weights named by the index are missing",
                    where=f"{where}/{index}",
                    got=", ".join(missing[:3]),
                    remedy="copy the folder again",
                )
            return shards
    return None
