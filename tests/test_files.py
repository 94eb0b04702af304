"""Results that are written whole or not at all: killed at every step, refused, unwritable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sepjax import files
from sepjax.files import ForeignFolder, WriteError, check_file, replacing, replacing_folder, whole_folder, write_text

ROOT = Path(__file__).parents[1]

# One process a moment: the n-th call that changes the disk is the last thing that it does.
KILLED = """
import os, shutil, sys
from pathlib import Path
from sepjax import files

root = Path(sys.argv[1])

def save(text):
    with files.replacing_folder(root / "place", "ours", lambda folder: (folder / "a").exists()) as partial:
        (partial / "a").write_text(text)
        (partial / "b").write_text(text)
    files.write_text(root / "file", text)

def kill_at(n):
    left = [n]
    def dying(real):
        def call(*arguments, **options):
            left[0] -= 1
            if not left[0]:
                os._exit(9)
            return real(*arguments, **options)
        return call
    os.fsync, os.unlink, os.rmdir = map(dying, (os.fsync, os.unlink, os.rmdir))
    os.rename, os.replace, os.mkdir = map(dying, (os.rename, os.replace, os.mkdir))

def contents(*paths):
    return {path.read_text() for path in paths}

save("0")
for n in range(1, 100):
    before, = contents(files.whole_folder(root / "place") / "a")
    if not (child := os.fork()):
        kill_at(n)
        save(str(n))
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    place = files.whole_folder(root / "place")
    assert len(contents(place / "a", place / "b")) == 1, n
    assert contents(place / "a") <= {before, str(n)}, n
    assert (root / "file").read_text().isdecimal(), n
    if not killed:
        break
assert n > 12, n
save("last")
assert sorted(path.name for path in root.iterdir() if ".file." not in path.name) == ["file", "place"]
assert contents(root / "place" / "a", root / "place" / "b", root / "file") == {"last"}
"""


def test_killed_at_any_moment_the_old_or_the_new_is_there(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def never(folder):
    return False


def test_an_error_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "file", "old")
    with replacing_folder(tmp_path / "place", "ours", never) as partial:
        (partial / "a").write_text("old")

    def fail(error):
        with replacing(tmp_path / "file") as partial:
            partial.write_text("half")
            raise error
        with replacing_folder(tmp_path / "place", "ours", lambda _: True) as partial:
            (partial / "a").write_text("half")
            raise error

    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises((KeyboardInterrupt, WriteError)):
            fail(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "place"]
    assert (tmp_path / "file").read_text() == (tmp_path / "place" / "a").read_text() == "old"


def test_a_foreign_folder_is_refused_and_kept(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    monkeypatch.chdir(tmp_path / "place")
    for place, message in (("place", "holds thesis.tex, which is not a stream"), ("file", "is a file")):
        for attempt in (files.check_folder, lambda *a: replacing_folder(*a).__enter__()):
            with pytest.raises(ForeignFolder, match=message):
                attempt(tmp_path / place, "a stream", never)
    with pytest.raises(ForeignFolder, match="the working folder"):
        files.check_folder(".", "a stream", lambda _: True)
    with pytest.raises(ForeignFolder, match="a mount point"):
        files.check_folder("/", "a stream", lambda _: True)
    assert (tmp_path / "place" / "thesis.tex").read_text() == "years of work"


def test_what_cannot_be_written_is_named_in_one_line_and_leaves_nothing(tmp_path):
    for place in ("/proc/x/y", tmp_path / ("n" * 300)):
        for attempt in (files.check_folder, lambda *a: replacing_folder(*a).__enter__()):
            with pytest.raises(WriteError, match=r"cannot write '/\S+': [^\n]+$"):
                attempt(place, "a stream", never)
        for attempt in (check_file, lambda path: write_text(path, "x")):
            with pytest.raises(WriteError, match=r"cannot write '/\S+': [^\n]+$"):
                attempt(place)
    with pytest.raises(WriteError, match="it is a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(FileNotFoundError, match="elsewhere") as error, replacing(tmp_path / "file"):
        Path("/elsewhere").read_text()  # a source's error keeps its name
    assert not isinstance(error.value, WriteError)
    files.check_folder(tmp_path / "new" / "deep", "a stream", never)
    check_file(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_one_folder(tmp_path):
    with replacing_folder(tmp_path / "place", "ours", never) as partial:
        (partial / "a").write_text("first")
        with pytest.raises(WriteError, match="another process is writing it"):
            replacing_folder(tmp_path / "place", "ours", never).__enter__()
        assert (partial / "a").read_text() == "first"
    assert (whole_folder(tmp_path / "place") / "a").read_text() == "first"


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    check_file("/dev/null")
    write_text("/dev/null", "gone")
    assert not Path("/dev/null").is_file()
