"""What a person sees while a command works: progress, log lines, and facts.

    stage   a stretch of work with a name, a unit and, if known, a total: shown with rate, time left and elapsed time
    result  what a command was asked for; only results go to standard output, everything else to standard error

On a terminal a stage is a live line; elsewhere (a log file, a pipe) it is a plain line now and then.
Stages do not nest.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID
from rich.table import Column, Table
from rich.text import Text

from liquid_llm.formatting import escape_controls, format_count, format_seconds
from liquid_llm.masking import MaskingFilter, process_masker
from liquid_llm.verbosity import CHATTY, asked_level

PLAIN_LINE_SECONDS = 15.0
RATE_WINDOW_SECONDS = 30.0

_PACKAGE = "liquid_llm"
_HANDLER_NAME = "liquid-llm"
_BRIEF = "brief"  # attribute of a log record


@functools.cache
def stderr_console() -> Console:
    """The one console of this process's standard error, so that log lines and live progress do not tear each other."""
    return Console(stderr=True, highlight=False)


# ------------------------------------------------------------------------------------------------------------- logging


def setup_logging(level: str = "INFO", *, most: str = "DEBUG") -> None:
    """Send log lines to standard error, short and with secrets masked. A second call replaces the first.

    This package speaks from ``level`` on, or from what ``--log_level`` and ``--quiet`` say; everybody else from WARNING
    on, or from there, but for those of ``CHATTY``, whose warnings only ``--log_level=debug`` shows. Stages are shown
    where INFO is.

    Args:
        most: as low as the level may be, whatever is asked for: the later ranks of a run say no more than warnings.
    """
    root, package = logging.getLogger(), logging.getLogger(_PACKAGE)
    for old in [handler for handler in root.handlers if handler.get_name() == _HANDLER_NAME]:
        root.removeHandler(old)
    shown = max(getattr(logging, asked_level() or level), getattr(logging, most))
    console = stderr_console()
    handler: logging.Handler
    if console.is_terminal:
        # Numbers, paths and JSON are not coloured, and words such as GET are not marked: only its level has a colour.
        handler = RichHandler(
            console=console,
            show_path=False,
            markup=False,
            highlighter=NullHighlighter(),
            keywords=[],
            log_time_format="%H:%M:%S",
        )
        handler.setFormatter(_BriefFormatter("%(message)s"))
        handler.addFilter(lambda record: getattr(record, _BRIEF, None) != "")
    else:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    handler.set_name(_HANDLER_NAME)
    handler.setLevel(shown)
    handler.addFilter(MaskingFilter(process_masker()))
    root.addHandler(handler)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET if shown <= logging.DEBUG else logging.ERROR)
    package.setLevel(min(shown, logging.INFO))  # the log file of a run has all from there on, whatever is shown


def brief(text: str) -> dict[str, str]:
    """For ``log.info(..., extra=brief(...))``: what a terminal shows instead of the message; "": nothing at all.

    A log file and standard error that is no terminal get the whole message.
    """
    return {_BRIEF: text}


class _BriefFormatter(logging.Formatter):
    """What was said in brief, where it was."""

    def format(self, record: logging.LogRecord) -> str:
        text: str | None = getattr(record, _BRIEF, None)
        return super().format(record) if text is None else escape_controls(process_masker().text(text))


def _stage_console() -> Console:
    """Where stages are shown: nowhere in a process that says no more than warnings."""
    own = [handler for handler in logging.getLogger().handlers if handler.get_name() == _HANDLER_NAME]
    return _nowhere() if any(handler.level > logging.INFO for handler in own) else stderr_console()


def _nowhere() -> Console:
    return Console(stderr=True, quiet=True, force_terminal=False)


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 cannot subscript it
    """Writes to whatever standard error is at the moment, one unwrapped line a record."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = stderr_console().file  # setStream would flush the old one, which may be closed by now
        super().emit(record)


# ------------------------------------------------------------------------------------------------------------ progress


class RateMeter:
    """Units a second over the last ``window_seconds``: follows a change of pace, unlike the mean since the start."""

    def __init__(self, clock: Callable[[], float], window_seconds: float = RATE_WINDOW_SECONDS) -> None:
        self._clock = clock
        self._window_seconds = window_seconds
        self._points: deque[tuple[float, float]] = deque([(clock(), 0.0)])
        self._done = 0.0

    def add(self, amount: float) -> None:
        now = self._clock()
        self._done += amount
        if len(self._points) > 1 and now - self._points[-2][0] < self._window_seconds / 100:
            self._points[-1] = (now, self._done)  # bounds the memory: about a hundred points a window
        else:
            self._points.append((now, self._done))
        while len(self._points) > 2 and now - self._points[1][0] >= self._window_seconds:
            self._points.popleft()

    def rate(self) -> float | None:
        """Units a second; None before anything was done."""
        since, before = self._points[0]
        done, seconds = self._done - before, self._clock() - since
        return done / seconds if done > 0 and seconds > 0 else None


class Stage:
    """Progress of one stretch of work, as a context manager.

    Args:
        name: what is being done, one or two words.
        unit: what is counted, in the plural (``tokens``).
        total: how many there are, None where unknown.
        done: how many were done before (a continued job); they do not count for the rate.
        console: where to show it; standard error if None.
        clock: seconds, monotonic.
        line_seconds: without a terminal, the time between two lines.
    """

    def __init__(
        self,
        name: str,
        *,
        unit: str,
        total: float | None = None,
        done: float = 0.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        line_seconds: float = PLAIN_LINE_SECONDS,
    ) -> None:
        self.name, self.unit, self.total, self.done = name, unit, total, done
        self._console = _stage_console() if console is None else console
        self._clock = clock
        self._line_seconds = line_seconds
        self._lock = threading.Lock()
        self._note = ""
        self._first = done
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._began = self._last_line = clock()
        self._meter = RateMeter(clock)

    def __enter__(self) -> Stage:
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                *([BarColumn(bar_width=20)] if self.total and self._console.width >= 110 else []),  # words come first
                _StatusColumn(self),
                console=self._console,
                transient=True,
                refresh_per_second=5,
                redirect_stdout=False,
                expand=True,
            )
            self._task = self._progress.add_task(self.name, total=self.total)
            self._progress.update(self._task, completed=self.done)
            self._progress.start()
        return self

    def advance(self, amount: float = 1) -> None:
        """Count ``amount`` units as done; from any thread."""
        with self._lock:
            self.done += amount
            self._meter.add(amount)
            if self._progress is not None:
                self._progress.update(self._task, completed=self.done)
            elif self._clock() - self._last_line >= self._line_seconds:
                self._last_line = self._clock()
                self._console.print(Text(self.status()), soft_wrap=True)

    def note(self, text: str) -> None:
        """Show a few words beside the numbers (the last loss, the current file)."""
        self._note = text

    def status(self) -> str:
        """The state in one line: done, share, rate, time left, elapsed, note."""
        return ", ".join([f"{self.name}: {self._amount()}", *self._pace(), *([self._note] if self._note else [])])

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        seconds = self._clock() - self._began
        worked = self.done - self._first
        rate = f", {format_count(worked / seconds)} {self.unit}/s" if worked > 0 and seconds > 0 else ""
        ending = "" if error is None else f" (stopped: {type(error).__name__})"
        done = f"{format_count(self.done)} {self.unit} in" if worked > 0 or error is not None else "nothing new to do,"
        line = f"{self.name}: {done} {format_seconds(seconds)}{rate}{ending}"
        self._console.print(Text(line), soft_wrap=True)

    def _amount(self) -> str:
        if not self.total:
            return f"{format_count(self.done)} {self.unit}"
        share = min(1.0, self.done / self.total)
        return f"{format_count(self.done)}/{format_count(self.total)} ({share:.0%})"  # the rate names the unit

    def _pace(self) -> list[str]:
        rate = self._meter.rate()
        parts = []
        if rate is not None:
            parts.append(f"{format_count(rate)} {self.unit}/s")
            if self.total and self.total > self.done:
                parts.append(f"{format_seconds((self.total - self.done) / rate)} left")
        return [*parts, f"{format_seconds(self._clock() - self._began)} elapsed"]


class _StatusColumn(ProgressColumn):
    """The stage's own line, so that a terminal and a log file say the same; cut at the terminal's edge."""

    max_refresh = 0.2

    def __init__(self, stage: Stage) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=1))
        self._stage = stage

    def render(self, task: Task) -> Text:
        text = Text(self._stage.status(), no_wrap=True, overflow="ellipsis")
        text.stylize("bold", 0, len(self._stage.name))
        return text


def result_console(console: Console | None, width: int) -> Console:
    """Where wide tables go: ``console``, or standard output; a file or a pipe has no edge: it is ``width`` wide."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console


def result_table(title: str) -> Table:
    """A table of results without columns yet, in the one style of all commands."""
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def as_markdown(table: Table) -> str:
    """A table of texts as Markdown, its title as a line of its own, without colours."""
    columns = [[_plain(column.header), *map(_plain, column.cells)] for column in table.columns]
    head, *rows = ["| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True)]
    rule = "|" + "|".join("---:" if column.justify == "right" else "---" for column in table.columns) + "|"
    title = [f"{_plain(table.title)}\n"] if table.title else []
    return "\n".join([*title, head, rule, *rows]) + "\n"


def _plain(shown: object) -> str:
    """A cell's characters; a bar would end it."""
    return (shown.plain if isinstance(shown, Text) else str(shown)).replace("|", "\\|")


def print_facts(title: str, rows: Sequence[tuple[str, str]], console: Console | None = None) -> None:
    """Print a title and named facts as two columns, for people; on standard error, unless told to say no
    more than warnings, if ``console`` is None."""
    if console is None:
        console = _nowhere() if asked_level() in ("WARNING", "ERROR") else stderr_console()
    width = max((len(name) for name, _ in rows), default=0)
    console.print(Text(title, style="bold"), soft_wrap=True)
    for name, text in rows:
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), text), soft_wrap=True)
