"""The report of a run: one self-contained page drawn from the run directory's files alone.

    runs     where runs lie, a folder or a URL       data     reads a run's files
    facts    what a run was, by its names            private  what a page does not tell
    charts   chooses the plots                       plot     draws one plot
    tables   plain values as HTML                    sections result, samples, checkpoints
    page     puts all together                       summary  what a run has come to

The same files give the same bytes: nothing of the moment or the machine of making gets into the page.
"""

from __future__ import annotations

from pathlib import Path

from liquid_llm import storage
from liquid_llm.report.data import read_run
from liquid_llm.report.page import render_page
from liquid_llm.report.runs import last_part

FILE_NAME = "report.html"


def build_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Raises:
        UsageError: the directory is none, or no run's.
        StorageError: the page cannot be written.
    """
    path = Path(run_dir) / FILE_NAME
    write_report(str(run_dir), str(path))
    return path


def write_report(run: str, page: str | None = None) -> str:
    """Make the page of the run at a path or URL and return where it is.

    Args:
        page: the file to write, a path or URL; by default ``report.html`` in a run directory, and for a run at a URL
            ``NAME-report.html`` in the working directory: where one can read, one may not be let write.

    Raises:
        UsageError: there is no run.
        StorageError: the run cannot be read, or the page not written.
    """
    if page is None:
        is_far = storage.is_remote(run)
        page = f"{last_part(run)}-{FILE_NAME}" if is_far else str(storage.local_path(run) / FILE_NAME)
    storage.write_bytes(page, render_page(read_run(run)).encode("utf-8", errors="replace"))
    return page
