"""The report of a run: one self-contained page drawn from the run directory's files alone.

    data     reads the files            plot     draws one plot
    charts   chooses the plots          tables   plain values as HTML
    page     puts all together

The same files give the same bytes: nothing of the moment or the machine of making gets into the page.
"""

from __future__ import annotations

from pathlib import Path

from liquid_llm.report.data import read_run
from liquid_llm.report.page import render_page
from liquid_llm.storage import write_bytes

FILE_NAME = "report.html"


def build_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Raises:
        UsageError: the directory is none, or no run's.
        StorageError: the page cannot be written.
    """
    path = Path(run_dir) / FILE_NAME
    write_bytes(str(path), render_page(read_run(run_dir)).encode("utf-8", errors="replace"))
    return path
