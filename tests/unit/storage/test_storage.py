from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import forked
from tests.support.faults import CUT, DROP, LOST, RESET, SHORT, SLOW, FaultyProxy, faulty_proxy
from tests.support.gcs import Bucket, free_port, put_packed, running_server
from tests.support.limits import largest_file

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.storage.failures import describe

PLACES = ["path", "file", "memory", "gs"]


@pytest.fixture
def bucket(gcs: Bucket) -> Bucket:
    return gcs


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of each kind."""
    if request.param == "gs":
        bucket: Bucket = request.getfixturevalue("gcs")
        return f"{bucket.uri}/a folder"
    return {
        "path": str(tmp_path / "a folder"),
        "file": f"file://{tmp_path}/a folder",
        "memory": f"memory://{uuid.uuid4().hex}/a folder",
    }[request.param]


@pytest.fixture
def quick_retries() -> Iterator[storage.RetryPolicy]:
    policy = storage.RetryPolicy(attempts=4, first_seconds=0.01, max_seconds=0.02)
    before = storage.set_retry_policy(policy)
    yield policy
    storage.set_retry_policy(before)


@pytest.fixture
def proxy(gcs: Bucket, monkeypatch: pytest.MonkeyPatch, quick_retries: storage.RetryPolicy) -> Iterator[FaultyProxy]:
    """The bucket of ``gcs``, behind a server that fails on demand; pauses between attempts are short."""
    with faulty_proxy(gcs.base) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.base)
        yield running


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("uri", "remote"),
    [
        ("runs/a", False),
        ("/abs/a b", False),
        ("file:///tmp/x", False),
        ("FILE:///tmp/x", False),
        ("gs://b/k", True),
        ("GS://b/k", True),
        ("https://h/x", True),
        ("memory://x", True),
        ("zip://a.txt::gs://b/a.zip", True),
        ("weird:name", False),
        ("a/b://c", False),
    ],
)
def test_what_is_remote(uri: str, remote: bool) -> None:
    assert storage.is_remote(uri) is remote
    if remote:
        with pytest.raises(StorageError, match="local path"):
            storage.local_path(uri)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("gs://b", "x"), "gs://b/x"),
        (("gs://b/", "/x/", "y"), "gs://b/x/y"),
        (("memory://", "x"), "memory://x"),
        (("/", "x"), "/x"),
        (("", "x"), "x"),
        (("a", "", "b"), "a/b"),
        (("file:///a", "b"), "file:///a/b"),
    ],
)
def test_join(parts: tuple[str, ...], expected: str) -> None:
    assert storage.join(*parts) == expected


@given(st.lists(st.text("abc.", min_size=1), min_size=1, max_size=5))
def test_joined_parts_come_apart_again(parts: list[str]) -> None:
    assert storage.join("gs://bucket", *parts).split("/")[3:] == parts


def test_local_path() -> None:
    assert storage.local_path("file:///a/b c") == Path("/a/b c")
    assert storage.local_path("a/b") == Path("a/b")


# -------------------------------------------------------------------------------------------- every kind of place alike


@pytest.mark.parametrize("size", [0, 1, 1000, 6 * 2**20])
def test_what_is_written_is_read(place: str, size: int, tmp_path: Path) -> None:
    data, uri = os.urandom(size), f"{place}/x/data.bin"
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri) == data
    with storage.open_read(uri) as stream:
        assert stream.read() == data
    storage.download(uri, tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == data
    storage.upload(tmp_path / "new" / "copy", f"{place}/up")
    assert storage.read_bytes(f"{place}/up") == data
    storage.copy(uri, f"{place}/copied/there")
    assert storage.read_bytes(f"{place}/copied/there") == data
    found = storage.stat(uri)
    assert found is not None
    assert (found.uri, found.name, found.size) == (uri, "data.bin", size)


def test_ranges_are_those_of_python(place: str) -> None:
    storage.write_bytes(f"{place}/x", b"0123456789")
    for start, end in [(0, 10), (3, 7), (5, None), (None, 4), (8, 100), (10, 12), (50, 60), (4, 4), (6, 2)]:
        assert storage.read_bytes(f"{place}/x", start, end) == b"0123456789"[start:end], (start, end)


def test_streams_seek_and_read_lines(place: str) -> None:
    lines = [b"line %d\n" % number for number in range(10_000)]
    storage.write_bytes(f"{place}/x", b"".join(lines))
    with storage.open_read(f"{place}/x") as stream:
        assert list(stream) == lines
        stream.seek(-5, io.SEEK_END)
        assert stream.read() == b"9999\n"
        stream.seek(7)
        assert stream.readline() == lines[1]


def test_two_readers_do_not_disturb_each_other(place: str) -> None:
    storage.write_bytes(f"{place}/x", bytes(range(200)))
    with storage.open_read(f"{place}/x") as one, storage.open_read(f"{place}/x") as two:
        assert one.read(50) == two.read(50)
        assert one.read() == two.read() == bytes(range(50, 200))


def test_overwriting_replaces_everything_and_changes_the_version(place: str) -> None:
    uri = f"{place}/x"
    storage.write_bytes(uri, b"a longer text")
    before = storage.stat(uri)
    time.sleep(0.01)
    storage.write_bytes(uri, b"another text!")
    after = storage.stat(uri)
    assert storage.read_bytes(uri) == b"another text!"
    assert before is not None
    assert after is not None
    assert before.version != after.version
    assert before.size == after.size


def test_listing_and_globbing(place: str) -> None:
    names = ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl.gz", "sub/e.txt"]
    for name in names:
        storage.write_bytes(f"{place}/{name}", name.encode())
    found = storage.list_files(place)
    assert [(info.name, info.uri, info.size) for info in found] == [
        (name, f"{place}/{name}", len(name)) for name in names
    ]
    assert storage.list_files(f"{place}/") == [
        storage.FileInfo(f"{place}/{one.name}", one.name, one.size, one.version) for one in found
    ]
    for pattern, expected in {
        "*.jsonl": names[:2],
        "sub/*": ["sub/c.jsonl", "sub/e.txt"],
        "**/*.jsonl": names[:3],
        "*/[cx].jsonl": ["sub/c.jsonl"],
        "?.jsonl": names[:2],
        "a.jsonl": ["a.jsonl"],
        "none-*": [],
        "sub": [],
        "nowhere/*/x": [],
    }.items():
        assert storage.glob(f"{place}/{pattern}") == [f"{place}/{name}" for name in expected], pattern
    for uri in storage.glob(f"{place}/**/*.jsonl"):
        assert storage.read_bytes(uri)


def test_existence(place: str) -> None:
    assert not storage.exists(place)
    assert storage.list_files(place) == []
    storage.write_bytes(f"{place}/sub/x", b"1")
    assert storage.exists(f"{place}/sub/x")
    assert storage.exists(f"{place}/sub")
    assert not storage.exists(f"{place}/su")
    assert not storage.exists(f"{place}/sub/x/y")
    folder = storage.stat(f"{place}/sub")
    assert folder is not None
    assert (folder.size, folder.version) == (0, "")


def test_removing(place: str) -> None:
    storage.write_bytes(f"{place}/x", b"1")
    storage.remove(f"{place}/x")
    assert not storage.exists(f"{place}/x")
    storage.remove(f"{place}/x")
    with pytest.raises(StorageError, match=r"/x: not found"):
        storage.remove(f"{place}/x", missing_ok=False)


def test_writing_is_checked_without_a_trace(place: str, tmp_path: Path) -> None:
    storage.check_writable(f"{place}/deep/er")
    assert not storage.exists(place)
    storage.write_bytes(f"{place}/x", b"1")
    storage.check_writable(place)
    assert [info.name for info in storage.list_files(place)] == ["x"]


READERS: list[Callable[[str, Path], Any]] = [
    lambda uri, _: storage.read_bytes(uri),
    lambda uri, _: storage.open_read(uri).read(),
    lambda uri, tmp: storage.download(uri, tmp / "x"),
    lambda uri, _: storage.copy(uri, f"{uri}-2"),
]


@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_there_is_named(place: str, reader: Callable[[str, Path], Any], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"a folder/nothing.*: not found.* Check the spelling") as caught:
        reader(f"{place}/nothing", tmp_path)
    assert place in str(caught.value)
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_many_threads_share_a_place(place: str) -> None:
    def work(number: int) -> bool:
        uri, data = f"{place}/{number % 5}/{number}", bytes([number]) * 5000
        storage.write_bytes(uri, data)
        return storage.read_bytes(uri) == data and storage.stat(uri) is not None

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))
    assert len(storage.list_files(place)) == 40


# ---------------------------------------------------------------------------------------------------------- local files


def test_names_that_look_like_patterns_are_names_first(tmp_path: Path) -> None:
    odd = tmp_path / "run[1]" / "a*.txt"
    storage.write_bytes(str(odd), b"odd")
    storage.write_bytes(str(tmp_path / "run1" / "ab.txt"), b"even")
    assert storage.glob(str(odd)) == [str(odd)]


def test_the_longest_possible_name_can_be_written(tmp_path: Path) -> None:
    name = "n" * 255
    storage.write_bytes(str(tmp_path / name), b"1")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(StorageError, match="name is too long"):
        storage.write_bytes(str(tmp_path / (name + "n")), b"1")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    storage.write_bytes(str(path), b"old")
    source = tmp_path / "source"
    source.write_bytes(b"n" * 50_000)
    for action in (
        lambda: storage.write_bytes(str(path), b"n" * 50_000),
        lambda: storage.upload(source, str(path)),
        lambda: storage.copy(str(source), str(path)),
    ):
        with largest_file(10_000), pytest.raises(StorageError, match=r"/x: .*larger.*Free some space"):
            action()
        assert path.read_bytes() == b"old"
        assert {one.name for one in tmp_path.iterdir()} == {"x", "source"}


def test_a_download_that_does_not_fit_leaves_nothing(bucket: Bucket, tmp_path: Path) -> None:
    storage.write_bytes(f"{bucket.uri}/big", b"n" * 50_000)
    with largest_file(10_000), pytest.raises(StorageError, match=rf"{tmp_path}/big: .*Free some space"):
        storage.download(f"{bucket.uri}/big", tmp_path / "big")
    assert not list(tmp_path.glob("*big*"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EMFILE, "too many open files"),
        (errno.EIO, "input/output error"),
    ],
)
def test_errors_of_the_system_in_plain_words(number: int, words: str) -> None:
    cause = describe(OSError(number, os.strerror(number), "/x"), writing=True)
    assert words in cause.problem
    assert cause.remedy
    assert not cause.passing


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for action in (
        lambda: storage.write_bytes(str(tmp_path / "f" / "x"), b""),
        lambda: storage.check_writable(str(tmp_path / "f")),
        lambda: storage.read_bytes(str(tmp_path)),
    ):
        with pytest.raises(StorageError):
            action()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_permission_denied(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission denied"):
        storage.check_writable(str(tmp_path))


# ------------------------------------------------------------------------------------------------ failing object stores

ACTIONS: dict[str, Callable[[str, Path], Any]] = {
    "read_bytes": lambda uri, _: storage.read_bytes(f"{uri}/x"),
    "range": lambda uri, _: storage.read_bytes(f"{uri}/x", 2, 5),
    "open_read": lambda uri, _: storage.open_read(f"{uri}/x").read(),
    "download": lambda uri, tmp: storage.download(f"{uri}/x", tmp / "down"),
    "write_bytes": lambda uri, _: storage.write_bytes(f"{uri}/y", b"new"),
    "upload": lambda uri, tmp: storage.upload(tmp / "big", f"{uri}/y"),
    "copy": lambda uri, _: storage.copy(f"{uri}/x", f"{uri}/y"),
    "remove": lambda uri, _: storage.remove(f"{uri}/x"),
    "stat": lambda uri, _: storage.stat(f"{uri}/x"),
    "exists": lambda uri, _: storage.exists(f"{uri}/x"),
    "glob": lambda uri, _: storage.glob(f"{uri}/*"),
    "list_files": lambda uri, _: storage.list_files(uri),
}


@pytest.fixture
def folder(gcs: Bucket, proxy: FaultyProxy, tmp_path: Path) -> str:
    """A remote folder with the object ``x``, and a local file ``big`` that needs a resumable upload."""
    (tmp_path / "big").write_bytes(bytes(6 * 2**20))
    storage.write_bytes(f"{gcs.uri}/d/x", b"0123456789")
    proxy.requests.clear()
    return f"{gcs.uri}/d"


# Every action meets an answer that says no and one that breaks off; what else can fail, a reader and a writer.
@pytest.mark.parametrize(
    ("action", "fault"),
    [(action, fault) for action in ACTIONS for fault in (503, CUT)]
    + [(action, fault) for action in ("read_bytes", "write_bytes") for fault in (429, 502, DROP)]
    + [("read_bytes", 500), ("read_bytes", 504), ("read_bytes", 408)],
)
def test_passing_failures_are_outlasted(
    folder: str, proxy: FaultyProxy, tmp_path: Path, action: str, fault: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = ACTIONS[action](folder, tmp_path)
    storage.write_bytes(f"{folder}/x", b"0123456789")
    storage.remove(f"{folder}/y")
    proxy.fail(fault, times=2)
    again = ACTIONS[action](folder, tmp_path)
    if action not in ("stat", "list_files"):  # those know the time of writing
        assert again == undisturbed
    proxy.heal()
    if action == "upload":
        assert storage.read_bytes(f"{folder}/y") == (tmp_path / "big").read_bytes()
    if action == "download":
        assert (tmp_path / "down").read_bytes() == b"0123456789"
    assert "trying again" in caplog.text or fault == DROP  # aiohttp itself asks again on a connection that was idle


@pytest.mark.parametrize("fault", [SHORT, RESET, SLOW, LOST])
@pytest.mark.parametrize("action", ["read_bytes", "range", "open_read"])
def test_half_an_object_is_never_taken_for_all_of_it(
    folder: str, proxy: FaultyProxy, tmp_path: Path, action: str, fault: str
) -> None:
    proxy.fail(fault, times=2, path="alt=media")
    assert ACTIONS[action](folder, tmp_path) == (b"234" if action == "range" else b"0123456789")
    proxy.heal()
    proxy.fail(SHORT, path="alt=media")
    for one in (action, "download"):
        with pytest.raises(StorageError, match="the connection was cut"):
            ACTIONS[one](folder, tmp_path)
    assert not (tmp_path / "down").exists()


@pytest.mark.parametrize("action", ["write_bytes", "upload", "copy", "remove"])
def test_what_was_done_and_not_answered_for_is_done_once(
    folder: str, proxy: FaultyProxy, tmp_path: Path, action: str
) -> None:
    proxy.fail(LOST, times=2)
    ACTIONS[action](folder, tmp_path)
    left = {
        "remove": {},
        "copy": {"x": 10, "y": 10},
        "write_bytes": {"x": 10, "y": 3},
        "upload": {"x": 10, "y": 6 << 20},
    }
    assert {info.name: info.size for info in storage.list_files(folder)} == left[action]
    assert proxy.counts == {LOST: 2}


def test_a_listing_in_pages_of_which_some_fail_is_whole(folder: str, proxy: FaultyProxy) -> None:
    for number in range(7):
        storage.write_bytes(f"{folder}/sub/{number}", b"x" * number)
    expected = storage.list_files(folder)
    proxy.page_size = 2
    proxy.draw_faults(3, 0.2, [503, 429, CUT, DROP, RESET])
    for _ in range(5):
        assert storage.list_files(folder) == expected
        assert storage.glob(f"{folder}/sub/*") == [f"{folder}/sub/{number}" for number in range(7)]
    assert sum(proxy.counts.values()) > 5
    assert len(expected) == 8


@pytest.mark.parametrize(
    ("action", "fault", "words"),
    [(action, 503, r"unavailable.*503") for action in ACTIONS]
    + [
        (action, fault, words)
        for action in ("read_bytes", "write_bytes")
        for fault, words in ((429, r"throttled.*429"), (500, r"failed.*500"), (504, "timed out"), (DROP, "was cut"))
    ],
)
def test_lasting_failures_are_explained_after_the_agreed_attempts(
    folder: str, proxy: FaultyProxy, tmp_path: Path, action: str, fault: int | str, words: str
) -> None:
    proxy.fail(fault)
    began = time.monotonic()
    with pytest.raises(StorageError, match=rf"{folder}.*{words}.*\. Run again in a few minutes\."):
        ACTIONS[action](folder, tmp_path)
    assert time.monotonic() - began < 10
    # four attempts at most for each of the one or two questions an action asks, and no attempts within attempts
    assert 4 <= len(proxy.requests) <= (24 if fault == DROP else 12)  # aiohttp repeats once on an idle connection
    assert not (tmp_path / "down").exists()


@pytest.mark.parametrize("action", ACTIONS)
def test_permission_denied_is_not_tried_again(folder: str, proxy: FaultyProxy, tmp_path: Path, action: str) -> None:
    proxy.fail(403)
    with pytest.raises(StorageError, match=rf"{folder}.*permission denied.*Grant this account"):
        ACTIONS[action](folder, tmp_path)
    assert len(proxy.requests) <= 4


def test_a_write_to_a_missing_bucket_says_so(gcs: Bucket) -> None:
    for action in (
        lambda: storage.write_bytes("gs://no-such-bucket/x", b""),
        lambda: storage.check_writable("gs://no-such-bucket"),
    ):
        with pytest.raises(StorageError, match=r"gs://no-such-bucket.*: the bucket or folder .* does not exist"):
            action()
    assert not storage.exists("gs://no-such-bucket/x")


def test_a_place_that_cannot_be_asked_is_not_absent(folder: str, proxy: FaultyProxy) -> None:
    proxy.fail(403)
    with pytest.raises(StorageError):
        storage.exists(f"{folder}/x")


def test_a_check_that_cannot_delete_fails(folder: str, proxy: FaultyProxy) -> None:
    proxy.fail(403, method="DELETE")
    with pytest.raises(StorageError, match="permission denied"):
        storage.check_writable(folder)


def test_a_long_upload_repeats_only_the_piece_that_failed(gcs: Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    data = os.urandom(110 * 2**20)  # three pieces of 50 MiB at most
    (tmp_path / "big").write_bytes(data)
    proxy.fail(503, times=1, path="upload_id")
    storage.upload(tmp_path / "big", f"{gcs.uri}/big")
    assert sum(one.num_bytes for one in proxy.requests) < 1.6 * len(data)
    assert storage.stat(f"{gcs.uri}/big").size == len(data)  # type: ignore[union-attr]
    storage.download(f"{gcs.uri}/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_nothing_listens(quick_retries: storage.RetryPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StorageError, match=r"gs://b/x: could not connect\. Check the network"):
        storage.read_bytes("gs://b/x")


@pytest.mark.parametrize("fault", [503, 429, DROP, CUT])
def test_plain_http_is_retried_too(bucket: Bucket, proxy: FaultyProxy, tmp_path: Path, fault: int | str) -> None:
    storage.write_bytes(f"{bucket.uri}/x", b"0123456789")
    url = f"{proxy.base}/{bucket.name}/x"
    for action in (
        lambda: storage.read_bytes(url),
        lambda: storage.open_read(url).read(),
        lambda: (storage.download(url, tmp_path / "x"), (tmp_path / "x").read_bytes())[1],
        lambda: b"0123456789"[: storage.stat(url).size],  # type: ignore[union-attr]
    ):
        proxy.fail(fault, times=2)
        assert action() == b"0123456789"
        proxy.heal()


@pytest.mark.parametrize(("fault", "words"), [(404, "not found"), (403, "permission denied"), (503, "unavailable")])
def test_plain_http_is_explained_too(
    bucket: Bucket, proxy: FaultyProxy, tmp_path: Path, fault: int, words: str
) -> None:
    proxy.fail(fault)
    url = f"{proxy.base}/{bucket.name}/x"
    for action in (
        lambda: storage.read_bytes(url),
        lambda: storage.open_read(url),
        lambda: storage.download(url, tmp_path / "x"),
    ):
        with pytest.raises(StorageError, match=rf"{url}.*: .*{words}"):
            action()
    with pytest.raises(StorageError, match="can only be read"):
        storage.write_bytes(url, b"")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket/x", r"no backend for s3:// is installed\. Install it: pip install 'liquid-llm\[s3\]'"),
        ("abfs://bucket/x", r"no backend for abfs:// is installed\. Install it: pip install 'liquid-llm\[azure\]'"),
        ("nonsense://x/y", "[Pp]rotocol not known"),
    ],
)
def test_unknown_backends_say_so(uri: str, words: str) -> None:
    with pytest.raises(StorageError, match=rf"{uri}: .*{words}"):
        storage.read_bytes(uri)


# ----------------------------------------------------------------------------------------------------- the retry policy


def test_pauses_grow_up_to_a_limit_and_differ() -> None:
    policy = storage.RetryPolicy(attempts=9, first_seconds=1.0, max_seconds=8.0)
    for failures, middle in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (9, 8)):
        pauses = [policy.pause_seconds(failures) for _ in range(200)]
        assert middle / 2 <= min(pauses) < max(pauses) <= 1.5 * middle
        assert len(set(pauses)) > 100


def test_the_policy_can_be_put_back() -> None:
    mine = storage.RetryPolicy(attempts=1)
    before = storage.set_retry_policy(mine)
    assert storage.set_retry_policy(before) is mine


# ------------------------------------------------------------------------------------------------------------ processes


def test_another_server_is_another_place(gcs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs keeps instances, and with them the address they were made for."""
    storage.write_bytes(f"{gcs.uri}/x", b"first")
    with running_server(tmp_path / "second") as second:
        second.new_bucket(gcs.name)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", second.base)
        assert not storage.exists(f"{gcs.uri}/x")
        storage.write_bytes(f"{gcs.uri}/x", b"second")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.base.removeprefix("http://"))  # without a scheme too
        assert storage.read_bytes(f"{gcs.uri}/x") == b"first"


def test_importing_storage_touches_nothing() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import liquid_llm.storage; import threading;"
        "heavy = {'fsspec', 'gcsfs', 'aiohttp', 'torch', 'requests'} & set(sys.modules);"
        "print(sorted(heavy), before == dict(os.environ), threading.active_count())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == "[] True 1"


def test_gcsfs_is_told_not_to_ask_for_grpc_only_with_an_emulator(gcs: Bucket) -> None:
    storage.write_bytes(f"{gcs.uri}/x", b"1")
    code = (
        "import os; from liquid_llm import storage; name = 'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT';"
        "print(os.environ.get(name));"
        f"print(storage.read_bytes({gcs.uri + '/x'!r}), os.environ.get(name))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"}
    run = forked.run(["-c", code], check=True, env=environment)
    assert run.stdout.splitlines() == ["None", "b'1' false"]
    assert run.stderr == ""


def test_a_forked_child_has_its_own_connection(gcs: Bucket) -> None:
    """A data loader's worker inherits what the parent opened; an event loop is not among what survives a fork."""
    code = f"""
import os
from liquid_llm import storage
uri = {gcs.uri!r}
storage.write_bytes(uri + '/x', b'parent')
pid = os.fork()
if pid == 0:
    storage.write_bytes(uri + '/y', storage.read_bytes(uri + '/x') + b' and child')
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(storage.read_bytes(uri + '/y'))
"""
    run = forked.run(["-c", code], check=True)
    assert run.stdout.strip() == "b'parent and child'"


def test_a_failure_prints_no_traceback_of_its_own(gcs: Bucket) -> None:
    code = """
from liquid_llm import storage
from liquid_llm.errors import StorageError
storage.set_retry_policy(storage.RetryPolicy(attempts=2, first_seconds=0.01))
try:
    storage.write_bytes('gs://no-such-bucket/x', b'')
except StorageError as error:
    print(error)
"""
    run = forked.run(["-c", code], check=True)
    assert run.stdout.count("\n") == 1
    assert run.stderr == ""


def test_no_thread_but_the_backend_s_own_is_left() -> None:
    assert not [thread.name for thread in threading.enumerate() if "uploader" in thread.name]


@pytest.mark.parametrize(
    ("path", "pattern", "found"),
    [
        ("/a/b.gz", "/a/*.gz", True),
        ("/a/c/b.gz", "/a/*.gz", False),
        ("/a/c/b.gz", "/a/**/*.gz", True),
        ("/a/b.gz", "/a/**/*.gz", True),
        ("/a/b1.gz", "/a/b[0-4].gz", True),
        ("/a/b9.gz", "/a/b[!0-4].gz", True),
        ("/a/b9.gz", "/a/b[0-4].gz", False),
        ("/a/b9.gz", "/a/b?.gz", True),
        ("/a/bXgz", "/a/b.gz", False),
        ("/a/part-0*.gz", "/a/*.gz", True),
        ("gs://b/a/c.gz", "gs://b/*/*.gz", True),
        ("/a/b.gz", "/a/b**.gz", False),
    ],
)
def test_a_path_is_matched_as_a_glob_would_find_it(path: str, pattern: str, found: bool) -> None:
    assert storage.matches(path, pattern) == found


def test_an_object_that_its_bucket_keeps_packed_is_read_whole(gcs: Bucket, tmp_path: Path) -> None:
    """As ``gsutil cp -Z`` uploads it: the size named is the packed one, and reading up to it would lose the rest."""
    plain = b"".join(b'{"text": "line %d"}\n' % number for number in range(20_000))
    put_packed(gcs, "packed.jsonl", plain)
    uri = f"{gcs.uri}/packed.jsonl"
    found = storage.stat(uri)
    assert found is not None
    assert found.size < len(plain)
    assert found.packed
    assert [one.packed for one in storage.list_files(gcs.uri)] == [True]
    with storage.open_read(uri) as stream:
        assert stream.read() == plain
        stream.seek(-20, io.SEEK_END)  # parquet is read from its end
        assert stream.read() == plain[-20:]
    assert storage.read_bytes(uri) == plain
    storage.download(uri, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == plain
    copies = {storage.fetch_once(uri, tmp_path / "once") for _ in range(2)}
    assert [path.read_bytes() for path in copies] == [plain]


def test_a_packed_object_that_is_a_bomb_is_refused(gcs: Bucket, tmp_path: Path) -> None:
    put_packed(gcs, "bomb.jsonl", bytes(8 * 2**20))
    for read in (storage.open_read, lambda uri: storage.download(uri, tmp_path / "bomb")):
        with pytest.raises(StorageError, match=r"bomb\.jsonl.*Content-Encoding: gzip.*far more.*without -Z or -z"):
            read(f"{gcs.uri}/bomb.jsonl")
    assert not list(tmp_path.iterdir())


def test_what_comes_through_a_cache_of_fsspec_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n')
    with storage.open_read(f"simplecache::file://{tmp_path}/a.jsonl") as stream:
        assert stream.read() == b'{"text": "a"}\n'


@pytest.mark.parametrize(("url", "words"), [("reference://x", "TypeError"), ("zip://a.jsonl::{}", "not a zip file")])
def test_a_place_that_cannot_be_opened_is_said_in_words(tmp_path: Path, url: str, words: str) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip at all" * 9)
    uri = url.format(f"{tmp_path}/a.zip")
    for action in (storage.stat, storage.list_files, storage.read_bytes, storage.open_read):
        with pytest.raises(StorageError, match=f"cannot be opened; got .*{words}"):
            action(uri)


class ContentEncodingError(ValueError):
    """As aiohttp calls it."""


class Answered(OSError):
    def __init__(self, status: int) -> None:
        super().__init__("answered")
        self.status = status


@pytest.mark.parametrize(
    ("error", "problem", "remedy"),
    [
        (FileNotFoundError(errno.ENOENT, "x"), "not found", "spelling"),
        (Answered(404), "not found", "spelling"),
        (PermissionError(errno.EACCES, "x"), "permission denied", "grant this account"),
        (Answered(403), "permission denied", "grant this account"),
        (Answered(401), "not signed in", "credentials"),
        (OSError(errno.EROFS, "x"), "read-only", "another place"),
        (OSError(errno.ENOSPC, "x"), "no space left on the disk", "free some space"),
        (OSError(errno.EDQUOT, "x"), "quota", "free some space"),
        (Answered(507), "no space left at the storage service", "free some space"),
        (Answered(412), "another writer has changed it", "one run alone"),
        (Answered(413), "refuses so large a file", "another place"),
        (Answered(429), "throttled", "few minutes"),
        (Answered(503), "unavailable", "few minutes"),
        (ContentEncodingError("x"), "packed (Content-Encoding)", "without Content-Encoding"),
    ],
)
def test_a_cause_has_its_words_and_its_remedy(error: Exception, problem: str, remedy: str) -> None:
    said = describe(error, writing=False).as_error("gs://b/x")
    assert problem in said.problem
    assert said.remedy is not None
    assert remedy in said.remedy
    assert "apture" not in str(said)
