"""A tiny run that other tests take a copy of, made in this process."""

import shutil
from pathlib import Path

import pytest

from sepjax.config import Config, load_config
from tests.reliability.common import write_config
from train import train


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    """The config file of the runs of this process."""
    return write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_file) -> Config:
    return load_config(tiny_file)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory) -> Path:
    """The workdir of a run that nothing disturbed. Not to be written to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(tiny, workdir)
    return workdir


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of that workdir, to be broken."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))
