"""What long work shows: a bar in a terminal, lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt import terminal
from minigpt.terminal import clock, progress, readable

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (7.25, "7.25"), (999, "999"), (1234567, "1.23M"), (999_999, "1M"), (2.5e13, "25T")]
)
def test_numbers_keep_three_digits(number: float, text: str) -> None:
    assert readable(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3723, "1:02:03")])
def test_times_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_plain_lines_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress("reading", 1000, "bytes", start=150) as bar:
        now[0] += 5 * terminal.PLAIN_LINE_EVERY
        bar.update(200, "at last")  # what came before this happens once, so that nothing can be estimated yet
        now[0] += terminal.PLAIN_LINE_EVERY
        bar.update(400, "all well")  # 200 bytes in 10 seconds: 20 a second, 30 seconds for the 600 that are left
        bar.update(401)  # too soon after
    assert capsys.readouterr().err == (
        "reading 200/1k bytes (20%), at last\nreading 400/1k bytes (40%), 0:30 left, 20 bytes/s, all well\n"
    )


def test_a_silent_bar_shows_nothing(capsys: pytest.CaptureFixture) -> None:
    with progress("reading", 10, "bytes", show=False) as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_bar() -> None:
    code = (
        "from minigpt.terminal import progress\n"
        "with progress('training', 10, 'steps') as bar:\n"
        "    bar.update(5, 'loss 1.25')\n"
        "    bar.update(10, 'loss 1.00')\n"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=slave, cwd=ROOT, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    process.wait()
    os.close(slave)
    shown = b""
    try:
        while block := os.read(master, 4096):
            shown += block
    except OSError:  # the other end is closed
        pass
    assert b"training" in shown
    assert b"100%" in shown
    assert b"loss 1.00" in shown
