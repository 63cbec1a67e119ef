"""What files say of order, framing and numerics, what a release knows of it, and what has changed since."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm import versions
from liquid_llm.versions import CHANGES, CURRENT, FIRST, Change, changes_since, find_newer, read_versions

NAMES = st.sampled_from(sorted(CURRENT))


@given(st.dictionaries(NAMES, st.integers(1, 9)))
def test_what_is_not_said_is_the_first(said: dict[str, int]) -> None:
    assert read_versions(said) == {**FIRST, **said}
    assert read_versions(None) == FIRST


@pytest.mark.parametrize("wrong", [[], "1", 1, {"order": 0}, {"order": -1}, {"order": "2"}, {"order": True}, {1: 1}])
def test_what_no_release_writes_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="versions"):
        read_versions(wrong)


@given(NAMES, st.integers(1, 20))
def test_only_versions_past_this_releases_are_newer(name: str, version: int) -> None:
    newer = find_newer({**FIRST, name: version})
    if version <= CURRENT[name]:
        assert newer is None
    else:
        assert newer == f"{name} {version} (known: at most {CURRENT[name]})"


def test_a_name_to_come_is_known_in_its_first_version_only() -> None:
    assert find_newer({**FIRST, "sharding": 1}) is None
    assert find_newer({**FIRST, "sharding": 2, "order": 7}) == (
        f"order 7 (known: at most {CURRENT['order']}), sharding 2 (known: at most 1)"
    )


def test_every_version_after_the_first_has_its_row_and_no_other_has() -> None:
    wanted = {(name, version) for name, last in CURRENT.items() for version in range(2, last + 1)}
    assert sorted((change.name, change.version) for change in CHANGES) == sorted(wanted)


def test_rows_say_what_changed_and_what_keeps_the_old_way() -> None:
    for change in CHANGES:
        assert len(change.what.split()) > 5
        assert re.search(r"--\w+|release \d+\.\d+", change.before)


def test_nothing_has_changed_since_now_and_everything_since_the_first() -> None:
    assert changes_since(CURRENT) == []
    known = [change for change in CHANGES if not change.kept]  # what is kept does not change for what goes on
    assert changes_since(FIRST) == sorted(known, key=lambda change: change.version)


def test_float32_is_spared_what_only_bfloat16_has() -> None:
    assert [change.name for change in changes_since(FIRST, bfloat16=True)] == ["numerics", "framing"]
    assert [change.name for change in changes_since(FIRST, bfloat16=False)] == ["framing"]


def test_changes_come_in_the_order_in_which_they_were_made() -> None:
    table = (
        Change("order", 3, "c", "x"),
        Change("framing", 2, "b", "x", bfloat16_only=True),
        Change("order", 2, "a", "x"),
    )
    assert [one.what for one in changes_since({"order": 1}, changes=table)] == ["b", "a", "c"]
    assert [one.what for one in changes_since({"order": 2}, bfloat16=False, changes=table)] == ["c"]


def test_numbers_and_names_agree() -> None:
    assert {"order": versions.ORDER, "framing": versions.FRAMING, "numerics": versions.NUMERICS} == CURRENT
