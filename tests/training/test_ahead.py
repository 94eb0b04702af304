"""What goes on beside the rest of a start is there when it is asked for, and is not done twice."""

import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax import interrupt
from sepjax.training.ahead import beside, compile_ahead


def test_a_result_is_waited_for_and_an_error_raised():
    go = threading.Event()
    result, error = beside(lambda x: go.wait(60) and x + 1, 1), beside(lambda: {}["missing"])
    go.set()
    assert result() == 2
    with pytest.raises(KeyError, match="missing"):
        error()


def test_the_call_finds_what_was_compiled_ahead(caplog):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    placed = jax.NamedSharding(mesh, jax.P())
    step = jax.jit(lambda state, x: (state + jnp.sin(x), x.sum()), donate_argnums=0, out_shardings=(placed, placed))
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=placed)
    with jax.set_mesh(mesh), jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, x = jax.device_put((np.zeros(8, np.float32), np.ones(8, np.float32)), placed)
        compile_ahead(mesh, [(step, shape, shape)])()
        caplog.clear()
        state, _ = step(state, x)
        step(state, x)
    assert "ompil" not in caplog.text


def test_what_cannot_be_compiled_is_told_by_the_wait():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    wait = compile_ahead(mesh, [(jax.jit(jnp.dot), *[jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2, 3)])])
    with pytest.raises(TypeError, match="2"):
        wait()
    compile_ahead(mesh, [])()


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
