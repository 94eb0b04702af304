"""A tiny run that other tests take a copy of, made in this process."""

import dataclasses
import functools
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import train as program
from sepjax.config import Config, load_config
from sepjax.training.step import eval_step, train_step
from tests.reliability.common import write_config


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    """The config file of the runs of this process."""
    return write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_file) -> Config:
    return load_config(tiny_file)


_jit, _jitted = jax.jit, {}


def _jit_once(function: Callable | None = None, **settings: Any) -> Any:
    """`jax.jit` that knows train.py's two steps again: tracing them anew is most of what a start here costs."""
    if not isinstance(function, functools.partial) or function.func not in (train_step, eval_step):
        return _jit(**settings) if function is None else _jit(function, **settings)  # `@jax.jit(...)` gives none
    config = function.args[0]
    key = function.func, dataclasses.replace(config, data=dataclasses.replace(config.data, name="", data_dir=""))
    return _jitted.setdefault(key, _jit(function, **settings))


def start_quickly(patch: pytest.MonkeyPatch) -> None:
    """On one device (tests/test_meshes.py has several), and each step of a config traced once for all its runs here.

    That processes of their own, which trace and load anew, give the same bits is in test_kill.py.
    """
    some = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: some)
    patch.setattr(jax, "jit", _jit_once)
    patch.setattr(program, "model_graph", _model_graph)
    patch.setattr(program, "abstract_state", _abstract_state)


_model_graph, _abstract_state = functools.cache(program.model_graph), functools.cache(program.abstract_state)


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch) -> None:
    """For every test of this folder."""
    start_quickly(monkeypatch)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory) -> Path:
    """The workdir of a run that nothing disturbed. Not to be written to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        start_quickly(patch)
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
