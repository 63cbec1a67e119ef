"""A disk that fills, or breaks, at any write of a real command: exit code 4, what was whole stays so, it goes on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.failing_disk import Disk, fail_with, small_disk, watch
from tests.support.gcs import Bucket
from tests.support.undisturbed import Undisturbed, require_mirrored

from liquid_llm.cli.main import main
from liquid_llm.jobs.doctor import examine
from liquid_llm.training import Trainer

pytestmark = pytest.mark.slow
JOBS = ("hybrid", "annealing", "capture", "capture of .pt files", "preparation")
WORDS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "the disk reports an input/output error",
    errno.EROFS: "the file system is read-only",
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def words(undisturbed: Undisturbed, name: str, output: Path) -> list[str]:
    """With the token cache on the same disk."""
    given = undisturbed[name][0].words(str(output), output)
    cached = [word for word in given if not word.startswith("--data_cache=")]
    return cached if cached == given else [*cached, f"--data_cache={output}/tokens"]


def find_kinds(undisturbed: Undisturbed, name: str, output: Path) -> dict[str, int]:
    """Kinds of writes of a job, and the number of the first of each."""
    with watch(output) as seen:
        assert main(words(undisturbed, name, output)) == 0
    shutil.rmtree(output)
    return seen.kinds


def fail_and_go_on(
    undisturbed: Undisturbed,
    name: str,
    disk: Disk,
    failing: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    code: int = errno.ENOSPC,
) -> None:
    """Run a job on a disk that fails; what it has left must be whole, and when there is room it goes on."""
    (job, expected), output = undisturbed[name], disk.folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    capsys.readouterr()
    with watch(output, failing):
        ended = main(words(undisturbed, name, output))
    said = capsys.readouterr().err
    assert ended in (0, 4), said[-2000:]
    if ended == 4:
        told = said[said.rindex("error: ") :]
        assert WORDS[code] in told
        if name != "preparation" and _has_begun(output / job.left):
            damaged = [part for part in examine(str(output / job.left)).parts if part.problem is not None]
            assert not [part for part in damaged if not part.found.endswith(", whole")], damaged
    disk.free()
    assert main(words(undisturbed, name, output)) == 0
    job.require_same(expected, str(output / job.left))


def _has_begun(folder: Path) -> bool:
    """Whether there is anything yet that could be damaged: a row, a checkpoint or a record."""
    return any(folder.glob("*.jsonl")) or any(folder.glob("*.pt")) or any(folder.glob("shard-*"))


@pytest.mark.parametrize("kind", ["open run/step-N.pt", "os.mkdir run/student"])
def test_a_disk_that_is_full_ends_a_run_in_words_and_with_room_it_goes_on(
    kind: str, undisturbed: Undisturbed, disk: Disk, kinds: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    fail_and_go_on(undisturbed, "hybrid", disk, disk.fill_at(kinds[kind]), capsys)


@pytest.fixture(scope="module")
def kinds(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return find_kinds(undisturbed, "hybrid", tmp_path_factory.mktemp("kinds") / "out")


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.EROFS, "os.mkdir run"), (errno.EDQUOT, "open run/step-N.meta.json")],
)
def test_a_disk_that_breaks_is_called_what_it_is(
    code: int,
    kind: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
    kinds: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_and_go_on(undisturbed, "hybrid", Disk(tmp_path, False), fail_with(kinds[kind], code), capsys, code)


def test_an_output_that_is_taken_away_under_a_run_is_an_error_in_words(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def taking(trainer: Trainer) -> object:
        if trainer.progress.step == 3:
            (tmp_path / "out").rename(tmp_path / "gone")
        return step(trainer)

    job, expected = undisturbed["hybrid"]
    given = job.words(str(tmp_path / "out"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", taking)
        assert main(given) == 4
    said = capsys.readouterr().err
    assert str(tmp_path / "out") in said[said.rindex("error: ") :]
    assert main(given) == 0
    job.require_same(expected, str(tmp_path / "out" / job.left))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_each_kind_of_write_of_each_job_may_fail(
    code: int, name: str, undisturbed: Undisturbed, disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find_kinds(undisturbed, name, tmp_path / "kinds")
    assert len(found) >= 10
    for number in found.values():
        failing = disk.fill_at(number) if code == errno.ENOSPC else fail_with(number, code)
        fail_and_go_on(undisturbed, name, disk, failing, capsys, code)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_each_kind_of_write_of_a_run_with_a_mirror_may_fail(
    undisturbed: Undisturbed, disk: Disk, gcs: Bucket, tmp_path: Path
) -> None:
    """What is staged to be sent and the mark of the lease too; the same command ends with all of it in the bucket."""
    job, expected = undisturbed["annealing"]
    with watch(tmp_path / "work") as seen:
        assert main(job.words(f"{gcs.uri}/kinds", tmp_path / "work")) == 0
    assert any("/.upload/" in kind for kind in seen.kinds)
    for number in seen.kinds.values():
        output, work = f"{gcs.uri}/{number}", disk.folder / f"work-{number}"
        given = job.words(output, work)
        with watch(work, disk.fill_at(number)):
            assert main(given) in (0, 4), number
        disk.free()
        assert main(given) == 0, number
        (run_dir,) = work.iterdir()
        job.require_same(expected, str(run_dir))
        require_mirrored(run_dir, output)
        shutil.rmtree(work)
