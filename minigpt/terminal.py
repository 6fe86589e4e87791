"""Progress bars in a terminal, plain lines elsewhere; notices."""

from __future__ import annotations

import codecs
import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

PLAIN_LINE_EVERY = 10.0  # seconds between two lines if output is not a terminal

BAR_EVERY = 0.1  # seconds between two updates of the bar


class Progress(Protocol):
    """A progress bar: `update` sets it to `done` units and can set the text beside it."""

    def update(self, done: float, text: str = "") -> None: ...


_hushed = False


@contextmanager
def hushed(hush: bool = True) -> Iterator[None]:
    """Suppress notices and progress within a `with` block, if `hush` is true."""
    global _hushed
    before, _hushed = _hushed, hush or _hushed
    try:
        yield
    finally:
        _hushed = before


def notice(line: str) -> None:
    """Print one line to standard error, separate from the program's output."""
    if not _hushed:
        print(spelled(line), file=sys.stderr, flush=True)


def spelled(line: str) -> str:
    """Escape bytes of file names that are not UTF-8 (surrogates in Python), such as \\udce9 for byte E9."""
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


def show_what_can_be_shown() -> None:
    """Make standard output escape characters that its encoding lacks (\\xe9, \\u4e2d) instead of failing.

    UTF-8 output that passes through invalid bytes, such as those of a file name, keeps doing so.
    """
    out: Any = sys.stdout
    if not isinstance(out, io.TextIOWrapper):  # closed output is None; notebooks have their own class
        return
    passes_on = out.errors == "surrogateescape" and codecs.lookup(out.encoding).name == "utf-8"
    if out.errors in ("strict", "surrogateescape") and not passes_on:
        out.reconfigure(errors="backslashreplace")


_told: set[str] = set()


def notice_once(line: str) -> None:
    """Print a notice at most once a process, for example about a folder that is read several times."""
    if not _hushed and line not in _told:
        _told.add(line)
        notice(line)


def readable(number: float) -> str:
    """Format a number with three significant digits and a suffix: 1234567 -> '1.23M'."""
    for suffix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or suffix == "T":
            break
        number /= 1000
    return f"{number:.3g}{suffix}"


def clock(seconds: float) -> str:
    """Format seconds as a duration: 3723 -> '1:02:03', 75 -> '1:15'."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class _Silent:
    def update(self, done: float, text: str = "") -> None:
        pass


class _Rate:
    """Units per second since the first update, so that one-time work before it (loading, compiling) does not count."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None  # seconds, units

    def at(self, now: float, done: float) -> float:
        """Average rate so far; 0 at the first update."""
        if self.first is None:
            self.first = (now, done)
        began, before = self.first
        return (done - before) / max(now - began, 1e-9)


class _PlainLines:
    """Progress as a line every PLAIN_LINE_EVERY seconds, for log files, pipes and schedulers."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.printed = time.monotonic()
        self.rate = _Rate()

    def update(self, done: float, text: str = "") -> None:
        now = time.monotonic()
        rate = self.rate.at(now, done)
        if now - self.printed < PLAIN_LINE_EVERY:
            return
        self.printed = now
        line = f"{self.description} {readable(done)}"
        if self.total:
            line += f"/{readable(self.total)} {self.unit} ({100 * done / self.total:.0f}%)"
            if rate > 0:
                line += f", {clock((self.total - done) / rate)} left"
        else:
            line += f" {self.unit}"
        if rate > 0:
            line += f", {readable(rate)} {self.unit}/s"
        notice(f"{line}{', ' + text if text else ''}")


class _Bar:
    def __init__(self, bar: Any, task: Any, total: float | None) -> None:
        self.bar, self.task, self.total = bar, task, total
        self.shown = time.monotonic()
        self.rate = _Rate()

    def update(self, done: float, text: str = "") -> None:
        now = time.monotonic()
        rate = self.rate.at(now, done)
        if now - self.shown < BAR_EVERY and done != self.total:
            return
        self.shown = now
        self.bar.update(self.task, completed=done, text=text, rate=readable(rate) if rate > 0 else "-")


@contextmanager
def progress(
    description: str, total: float | None, unit: str, *, start: float = 0, show: bool = True
) -> Iterator[Progress]:
    """Show a progress bar with rate and remaining time inside a `with` block.

    Args:
        description: text at the left of the bar.
        total: number of units; None if unknown.
        unit: name of the unit ("tokens", "steps", "bytes").
        start: units done before (a resumed run); they do not count towards the rate.
        show: False shows nothing; for ranks other than 0.
    """
    if not show or _hushed:
        yield _Silent()
        return
    if not sys.stderr.isatty():
        yield _PlainLines(description, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]} " + unit + "/s"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}"),
    ]
    with RichProgress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task(description, total=total, completed=int(start), text="", rate="-")
        yield _Bar(bar, task, total)
