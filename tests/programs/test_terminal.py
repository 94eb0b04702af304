"""`sepjax chat` in a real terminal: a pseudo-terminal that is the program's own, with one session for all there is.

A subprocess takes eight seconds of a CPU, so there is one. What it does without a terminal: test_generate.py.
"""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from sepjax.hub.export import save_folder
from sepjax.model.transformer import merge, split
from tests.generation.test_chat import CHATML, talker  # noqa: F401

ROOT = Path(__file__).parents[2]
ROWS, COLUMNS = 40, 100
# The terminal becomes the program's controlling one, whose Ctrl-C is a signal.
LAUNCH = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "from sepjax.__main__ import main; sys.argv[0] = 'sepjax'; main()"
)
UP, LEFT, END, RUBOUT, ALT_ENTER, CTRL_C = "\x1b[A", "\x1b[D", "\x1b[F", "\x7f", "\x1b\r", "\x03"


class Session:
    """A program in a terminal of its own."""

    def __init__(self, *words, cwd, **environment):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        more = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *words], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            cwd=cwd, env={k: v for k, v in os.environ.items() if k != "NO_COLOR"} | more,
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(self._master, False)
        self.raw, self._seen = b"", 0

    def _read(self):
        try:
            new = os.read(self._master, 65536)
            self.raw += new
            for _ in range(new.count(b"\x1b[6n")):  # where is the cursor? Without an answer there is no status line
                self.keys("\x1b[1;1R")
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # the other end is closed
            return False
        return True

    @property
    def text(self):
        """All that came so far, without what moves the cursor and colours."""
        return re.sub(r"\x1b(\[[0-9;?]*[@-~]|[=>])", "", self.raw.decode(errors="replace"))

    def until(self, words, seconds=60):
        """Waits for words that had not come yet; returns what came up to them."""
        end = time.monotonic() + seconds
        while (at := self.text.find(words, self._seen)) < 0:
            assert time.monotonic() < end, f"{words!r} did not come; the screen had:\n{self.text[self._seen :]}"
            assert self._read() or words in self.text[self._seen :], self.text[self._seen :]
        begun, self._seen = self._seen, at + len(words)
        return self.text[begun : self._seen]

    def keys(self, *keys):
        """Presses keys, one after the other."""
        for key in keys:
            os.write(self._master, key.encode())

    def paste(self, text):
        """Pastes text, as a terminal does it: with marks around it where the program has asked for them last."""
        is_marked = self.raw.rfind(b"\x1b[?2004h") > self.raw.rfind(b"\x1b[?2004l")
        data = (f"\x1b[200~{text}\x1b[201~" if is_marked else text.replace("\n", "\r")).encode()
        while data:
            try:
                data = data[os.write(self._master, data[:4096]) :]
            except BlockingIOError:
                self._read()

    def end(self, seconds=60):
        """Waits for the end; returns the exit code."""
        end = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < end, self.text[self._seen :]
        os.close(self._master)
        return self.process.wait(seconds)


def tireless(model):
    """The model, but that its answers do not end: control tokens are never drawn, where others are so sure."""
    graph, params = split(model)
    embedding = params["embedding"]["embedding"]
    return merge(graph, params | {"embedding": {"embedding": (16 * embedding).at[: len(CHATML)].set(0)}})


@pytest.fixture(scope="module")
def session(talker, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("chat")
    save_folder(tireless(talker[0]), talker[1], folder / "model")
    words = ["chat", f"--model={folder / 'model'}", "--temperature=1", "--max_repeats=0"]
    session = Session(*words, cwd=folder, SEPJAX_CACHE=str(folder / "cache"))
    yield session, folder
    session.process.kill()
    session.process.wait()


def ready(session):
    """Waits for the next prompt: before it, keys are the terminal's own to deal with. Returns the status line."""
    return session.until("tokens seen").splitlines()[-1]


def cut(session):
    """Cuts an answer short, once it has begun."""
    session.until("\ufffd")  # a model at random writes bytes that are no characters
    session.keys(CTRL_C)
    session.until("(cut short)")


@pytest.mark.soak  # commands, keys and what is cut short: generation/test_talk.py over a screen that is scripted
def test_a_tour_of_a_terminal(session):
    session, folder = session
    session.until("/help lists what else there is")
    assert "0 sinks, 0 kept, 0 recent of 20 | 0 tokens seen" in ready(session)
    # Commands are completed and answered here.
    session.keys("/he\t")
    session.until("lp")
    session.keys("\r")
    assert "/save FOLDER" in session.until("offers to save")
    ready(session)
    session.keys("/nothing\r")
    session.until("unknown command /nothing")
    ready(session)
    # Wide characters take two columns, and are edited as one.
    session.keys("日本語 🙂", LEFT, RUBOUT, "!", END, ALT_ENTER, "second line", "\r")
    session.until("second line")
    cut(session)
    ready(session)
    # A pasted block of any length is one turn, and is kept as one line of history.
    block = "\n".join(f"line {i}: the cat sat, and looked. 日本" for i in range(300))
    assert len(block.encode()) > 2 * 4095
    session.paste(block)
    session.until("line 299")
    session.keys("\r")
    cut(session)
    ready(session)
    session.keys("/stats\r")
    stats = session.until("bytes more")
    assert re.search(r"turns +2\b", stats)
    assert int(re.search(r"seen +([\d,]+) tokens", stats)[1].replace(",", "")) > len(block.encode())
    assert re.search(r"of 20 slots \(2 sinks, \d kept, \d+ recent\)", stats)
    ready(session)
    # The last turn is answered anew: as many tokens of it are read, by the state of before.
    session.keys("/regenerate\r")
    cut(session)
    ready(session)
    session.keys("/stats\r")
    assert re.search(r"turns +2\b", session.until("bytes more"))
    ready(session)
    # Ctrl-C clears a line; what was typed before comes back with the arrow.
    session.keys("not this", CTRL_C, "/save kept\r")
    session.until("saved in kept")
    assert (folder / "kept" / "stream.json").exists()
    ready(session)
    session.keys("/clear\r")
    session.until("begun anew")
    assert "| 0 tokens seen" in ready(session)
    session.keys(UP, UP, "\r")  # the line before /clear
    session.until("saved in kept")
    ready(session)
    session.keys("//etc is a folder\r")
    cut(session)
    ready(session)
    session.keys(CTRL_C)  # twice
    session.until("save in which folder?")
    ready(session)
    session.keys("last\r")
    session.until("saved in last")
    assert session.end() == 0
    assert (folder / "last" / "stream.json").exists()
    assert "Traceback" not in session.text
    history = folder / "cache" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    kept = history.read_text().split("\n# ")
    assert sum("+line 0: the cat" in entry and "+line 299: " in entry for entry in kept) == 1
    assert any("+日本語!🙂\n+second line" in entry for entry in kept)
    assert not any("not this" in entry or "+last" in entry for entry in kept)


@pytest.mark.soak
def test_what_is_pasted_into_an_answer_is_one_turn(session):
    _, folder = session
    words = ["chat", f"--model={folder / 'model'}", "--temperature=1", "--max_repeats=0", "--max_new_tokens=2000"]
    session = Session(*words, cwd=folder, SEPJAX_CACHE=str(folder / "other"))
    try:
        ready(session)
        session.keys("The cat\r")
        session.until("\ufffd")
        session.paste("one line\nand another\nand a third")
        session.until("and a third")  # as it is echoed
        session.until("tokens seen", 200)
        session.keys("\r")
        cut(session)
        ready(session)
        session.keys("/stats\r")
        assert re.search(r"turns +2\b", session.until("bytes more"))
        session.keys("/quit\r")
        assert session.end() == 0
        assert session.raw.rstrip().endswith(b"\x1b[?2004l"), "the next program's pastes are as it wants them"
    finally:
        session.process.kill()
        session.process.wait()


@pytest.mark.soak  # what a terminal echoes while it is slow is on the screen, too
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_the_screen_is_what_it_should_be(session, tmp_path):
    """What the session wrote, on the screen of a real terminal: the same bytes, played again."""
    session, _ = session
    end = session.raw.find(b"/nothing")
    raw = session.raw[: session.raw.find(b"second line")]
    assert end > 0
    (tmp_path / "raw").write_bytes(raw)
    tmux = ["tmux", "-L", f"sepjax-{os.getpid()}", "-f", "/dev/null"]
    show = f"stty raw; cat '{tmp_path}/raw'; touch '{tmp_path}/done'; sleep 60"
    try:
        subprocess.run([*tmux, "-u", "new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), show], check=True)
        for _ in range(500):
            if (tmp_path / "done").exists():
                break
            time.sleep(0.02)
        time.sleep(0.2)
        screen = subprocess.run([*tmux, "capture-pane", "-p"], check=True, capture_output=True, text=True).stdout
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    lines = [line.rstrip() for line in screen.splitlines() if line.strip()]
    # A slow terminal's answers to "where is the cursor?" may be echoed before the editor reads them.
    assert any(line.endswith(">>> 日本語!🙂") for line in lines), screen
    assert "0 sinks, 0 kept, 0 recent of 20 | 0 tokens seen" in lines[-1], screen
