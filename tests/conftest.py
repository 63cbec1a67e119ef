"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.gcs import Bucket, FakeGcs, running_server


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGcs]:
    """One real fake-gcs-server for the whole session."""
    with running_server(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def gcs(gcs_server: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A fresh bucket; ``gs://`` URIs go to the fake server for the length of the test, in child processes too."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.base)
    return Bucket(gcs_server, gcs_server.new_bucket())
