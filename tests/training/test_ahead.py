"""What goes on beside the rest of a start is there when it is asked for, and is not done twice."""

import gc
import logging
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train as program
from sepjax import interrupt
from sepjax.config import load_config
from sepjax.data.errors import DataError
from sepjax.run.start import Start
from sepjax.training.ahead import Compiled, beside, compile_ahead
from tests.runs import start_quickly


def test_a_result_is_waited_for_and_an_error_raised():
    go = threading.Event()
    result, error = beside(lambda x: go.wait(60) and x + 1, 1), beside(lambda: {}["missing"])
    go.set()
    assert result() == 2
    with pytest.raises(KeyError, match="missing"):
        error()


def test_a_result_is_held_by_who_has_it_alone(monkeypatch):
    """A batch from another process is in shared memory, which Python may not find any more at the program's end."""
    monkeypatch.setattr(interrupt, "_unfinished", [])
    wait = beside(lambda: np.ones(3))
    seen = weakref.ref(wait())
    del wait
    gc.collect()
    while seen() is not None:  # the thread lets go of it a moment later than it tells
        time.sleep(0.001)
    assert all(is_done() for is_done in interrupt._unfinished)


def test_the_call_finds_what_was_compiled_ahead(caplog):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    placed = jax.NamedSharding(mesh, jax.P())
    step = jax.jit(lambda state, x: (state + jnp.sin(x), x.sum()), donate_argnums=0, out_shardings=(placed, placed))
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=placed)
    with jax.set_mesh(mesh), jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, x = jax.device_put((np.zeros(8, np.float32), np.ones(8, np.float32)), placed)
        (told,) = compile_ahead(mesh, {"step": (step, shape, shape)}).wait()
        assert told.name == "step"
        assert min(told.lowering, told.compiling) > 0
        caplog.clear()
        state, _ = step(state, x)
        step(state, x)
    assert "ompil" not in caplog.text


def test_what_cannot_be_compiled_is_told_by_the_wait():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    wrong = jax.jit(jnp.dot), *[jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2, 3)]
    ahead = compile_ahead(mesh, {"step": wrong})
    for wait in (ahead.wait_for_lowering, ahead.wait):
        with pytest.raises(TypeError, match="2"):
            wait()
    nothing = compile_ahead(mesh, {})
    nothing.wait_for_lowering()
    assert nothing.wait() == []


@pytest.mark.parametrize(
    ("steps_saved", "programs"), [(0, ["step", "evaluation", "weights"]), (5, ["step", "evaluation"]), (640, [])]
)
def test_a_start_compiles_what_it_needs_before_data_are_prepared(tmp_path, monkeypatch, steps_saved, programs):
    order = []

    def prepare(*_):
        order.append("data")
        raise DataError("no text")

    start_quickly(monkeypatch)
    monkeypatch.setattr(program, "compile_ahead", lambda mesh, calls: order.append(list(calls)))
    monkeypatch.setattr(program, "prepare_tokenizer", prepare)
    monkeypatch.setattr(program, "steps_on_disk", lambda folder: [steps_saved] * bool(steps_saved))
    with pytest.raises(DataError, match="no text"):
        program.train(load_config("sep_tiny"), tmp_path / "run")
    assert order == [programs, "data"]


def test_where_a_start_went_is_told_in_turn(monkeypatch):
    clock = iter([10.0, 12.5, 12.52, 20.0, 21.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    start = Start(began=9.0)
    for part in ("data", "nothing", "compiling", "data"):
        start.done(part)
    programs = Compiled("step", 1.25, 6.0, False), Compiled("evaluation", 0.5, 0.25, True)
    assert start.in_words(programs) == (
        "first step after 12.0 s: imports 1.0, data 3.5, compiling 7.5; programs, lowering + compiling: "
        "step 1.2 + 6.0, evaluation 0.5 + 0.2 (kept)"
    )
    assert start.seconds == 12


def test_an_error_that_ends_the_program_need_not_wait_for_what_has_begun(monkeypatch):
    monkeypatch.setattr(interrupt, "_unfinished", [])
    ended, left = threading.Event(), []
    monkeypatch.setattr(interrupt, "_leave", left.append)
    finish = beside(ended.wait)
    interrupt.end_unless_done(2)
    ended.set()
    assert finish()
    interrupt.end_unless_done(3)
    assert left == [2]
