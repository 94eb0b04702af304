"""What a program shows while it is at work: on a terminal, after a while, and gone when it is done."""

import contextlib
import os
import pty
import re
import sys
import time

import pytest

from sepjax import console, progress
from sepjax.command import settings
from sepjax.command.flags import call
from sepjax.progress import Work, counted, quietly, working


@contextlib.contextmanager
def terminal(monkeypatch):
    """stderr as a terminal of its own; the list gets what came out there."""
    master, slave = pty.openpty()
    shown = []
    with open(slave, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        os.set_blocking(master, False)
        yield shown
        with contextlib.suppress(BlockingIOError):
            while part := os.read(master, 65536):
                shown.append(part.decode())
    os.close(master)


def lines(shown):
    """The text, without what moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(shown)).replace("\r", "\n").split("\n")


def test_work_is_shown_while_it_lasts_and_its_time_stays(monkeypatch, capfd):
    monkeypatch.setenv("TERM", "xterm")
    with terminal(monkeypatch) as shown:
        with working("loading 日本", 4e6, "bytes", patience=0.0) as outer, working("compiling", patience=0.0):
            outer.add(1e6)
            time.sleep(3 * progress._EVERY)
            print("a result")  # of whoever reads stdout: it is not in the terminal
            console.say("a warning")
        with working("something quick"):
            pass
        with pytest.raises(OSError, match="broken"), working("what fails", patience=0.0):
            raise OSError("broken")
        assert list(counted(range(3), "counting", 3, "things")) == [0, 1, 2]
    said = lines(shown)
    assert any("loading 日本" in line and "25% of 4 MB" in line and "left" in line for line in said)
    assert any(line.startswith("compiling ") and "..." in line for line in said)
    assert any(line.startswith("a warning") for line in said)
    assert not any("quick" in line or "counting" in line for line in said)
    (kept,) = (line for line in said if line.startswith("loading 日本: 4 MB, "))  # when all is done
    assert said.index(kept) > max(i for i, line in enumerate(said) if "25% of" in line)
    assert not any(line.startswith("what fails:") for line in said)
    assert "\x1b[?25l" not in "".join(shown)  # a cursor that is hidden stays so after a kill
    assert capfd.readouterr().out == "a result\n"
    assert not progress._display._works


def test_nobody_sees_it_in_a_log_at_once_or_when_asked_for_quiet(monkeypatch, capfd):
    with working("loading", patience=0.0):
        time.sleep(2 * progress._EVERY)
    assert capfd.readouterr() == ("", "")
    with terminal(monkeypatch) as shown:
        assert progress.is_shown()
        with console.given_to(lambda line: None):
            assert not progress.is_shown()
        seen = []
        for quiet in (True, False):
            call(lambda _: seen.append(progress.is_shown()), settings.Settings(quiet=quiet))
        assert seen == [False, True]
        with quietly(), working("loading", patience=0.0):
            time.sleep(2 * progress._EVERY)
    assert shown == []


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch, capfd):
    monkeypatch.setattr(progress, "LOG_PATIENCE", 0.5)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with working("streaming", 200, "tokens", patience=0.0) as work:
        work.add(50)
        for clock[0] in (0.6, 0.7, 2.2):  # it has been at work for so long
            time.sleep(3 * progress._EVERY)
    with quietly(), working("asked for quiet", patience=0.0):
        clock[0] += 9.0
        time.sleep(2 * progress._EVERY)
    first, second, last = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"streaming: 25% of 200 tokens, 0\.\d s, \d\.\d s left", first)
    assert re.fullmatch(r"streaming: 25% of 200 tokens, \d\.\d s, \d+(\.\d)? s left", second), "twice as long"
    assert re.fullmatch(r"streaming: 200 tokens, \d\.\d s", last)


def test_how_far_it_is(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    work = Work("scoring", 200, "windows", 2.0)
    clock[0] = 4.0
    assert work.note() == "0% of 200 windows, 4.0 s"
    work.add(50)
    assert work.note() == "25% of 200 windows, 4.0 s, 12 s left"
    clock[0], work.total = 3_725.0, None
    assert work.note() == "1 h 02 min"
    assert Work("x", 2.5e9, "bytes", 0.0).note() == "0% of 2.5 GB, 0.0 s"


def test_a_terminal_that_has_gone_does_not_end_the_work(monkeypatch):
    def gone(*_, **__):
        raise OSError(5, "Input/output error")

    with terminal(monkeypatch):
        monkeypatch.setattr(progress, "_live", gone)
        with working("loading", patience=0.0) as work:
            time.sleep(2 * progress._EVERY)
            work.add(1)
    assert work.done == 1
    assert not progress._display._works
