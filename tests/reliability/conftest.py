"""A tiny run that other tests take a copy of, made in this process by steps that compile in no time."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import train as program
from sepjax.config import Config, load_config
from tests.reliability.common import write_config
from tests.runs import start_quickly, tell_all


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    """The config file of the runs of this process."""
    return write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_file) -> Config:
    return load_config(tiny_file)


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch) -> None:
    """For every test of this folder; the steps are train.py's own in test_kill.py alone."""
    start_quickly(monkeypatch)
    tell_all(monkeypatch)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory) -> Path:
    """The workdir of a run that nothing disturbed. Not to be written to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        start_quickly(patch)
        tell_all(patch)
        program.train(tiny, workdir)
    return workdir


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of that workdir, to be broken."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def nothing_is_left(request) -> Iterator[None]:
    """What a test's failed reads and writes leave is collected before it ends, not in whichever test comes later."""
    yield
    marks = [mark.args[0] for mark in request.node.iter_markers("filterwarnings")]
    if any("Unraisable" in mark for mark in marks):
        gc.collect()
