"""Programs of slots, compiled for a GPU that is not there: each is one CUDA graph, which the host starts and leaves."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax import interrupt
from sepjax.config import UserError
from sepjax.generation import device_loop
from sepjax.generation.device_loop import Request, compile_all, draw, make_ready
from sepjax.generation.graphs import _WHOLE
from sepjax.generation.prompts import row_keys
from sepjax.generation.readers import BoundedReader
from sepjax.generation.sampling import Sampling
from sepjax.measure import counted_compilations
from tests.generation.tiny import ROWS, tiny_engine

PROGRAM = """
import functools, sys
import jax, numpy as np
from sepjax.clocks import Clocks
from sepjax.generation.readers import BoundedReader
from sepjax.generation.slot_device import SlotDevice
from sepjax.generation.graphs import _WHOLE
from sepjax.generation.slot_programs import _exchange, _read, _steps
from sepjax.training.plan import topology_devices
from tests.generation.tiny import ROWS, tiny_engine

of, axes = tiny_engine().prepared, ("data", "fsdp", "tensor", "context")
device = SlotDevice(of, BoundedReader(of), ROWS, 3, Clocks())
rows, pool, arrivals = device.rows, device._pool, device.arrivals
mesh = jax.sharding.Mesh(np.asarray(topology_devices("h100:1x1")).reshape(1, 1, 1, 1), axes)
placed = jax.NamedSharding(mesh, jax.P())

def told(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), tree)

def compiled(program, donated, *given):
    jax.jit(program, donate_argnums=donated).lower(*map(told, given)).compile(compiler_options=_WHOLE)

with jax.set_mesh(mesh):
    model = of.params, rows
    compiled(functools.partial(_exchange, arrivals), (0, 1), rows, pool, np.zeros((4, 24 + arrivals.nbytes), np.uint8))
    read = functools.partial(_read, of.graph, of.attention, most=16)
    compiled(read, 1, *model, np.zeros((4, 3 + 8), np.int32), of.table)
    compiled(functools.partial(_steps, of.graph, of.attention, 3), 1, *model, np.zeros(ROWS + 1, np.int32), of.table)
"""


@pytest.mark.soak
def test_each_program_is_one_graph(tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13", reason='compiling for a GPU needs pip install -e ".[compile]"')
    environment = os.environ | {"XLA_FLAGS": f"--xla_dump_to={tmp_path}", "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=1200)
    for name in ("exchange", "read", "steps"):
        (file,) = tmp_path.glob(f"*jit__{name}.thunk_sequence_after_thunk_passes.txt")
        found = re.findall(r"^\d+: (\w+)", file.read_text(), re.MULTILINE)
        assert found == ["kCommandBuffer"], name
        assert "kWhile" in file.read_text(), "with a loop in it"
    assert "WHILE" in _WHOLE["xla_gpu_enable_command_buffer"]


def test_no_draw_on_a_gpu_sorts():
    """XLA gives a sort of many rows to a library that no CUDA graph can have: the host would start each step."""
    of = tiny_engine().prepared
    state = jax.eval_shape(lambda: BoundedReader(of).empty(row_keys(0, ROWS)))
    ones, sampling = jnp.ones(ROWS, jnp.int32), Sampling.create(0.8, 40, 0.9, 0.1, presence_penalty=1.0)
    request = Request(of.table_on_device, sampling, ones[:, None], ones, ones > 0, ones > 0, ones)
    traced = jax.jit(draw).trace(jax.ShapeDtypeStruct((ROWS, 320), np.float32), state, request)
    sorts = {name: set(re.findall(r"stablehlo\.sort|top_k", traced.lower(lowering_platforms=(name,)).as_text()))
             for name in ("cuda", "cpu")}  # fmt: skip
    assert sorts == {"cuda": set(), "cpu": {"top_k"}}


def test_what_is_compiled_side_by_side_is_found_by_the_first_call():
    x, double, wrong = np.ones(3, np.float32), jax.jit(lambda x: x * 2 + 0.5), jax.jit(lambda x: x @ np.ones(4))
    with counted_compilations() as before:
        compile_all({"double": (double, x), "half": (jax.jit(lambda x: x / 2 - 0.5), x)})
    assert len(before) == 2
    with counted_compilations() as after:
        assert double(x).tolist() == [2.5] * 3
    assert not after
    with pytest.raises(TypeError, match="dot_general"):
        compile_all({"wrong": (wrong, x)})


def test_what_a_text_needs_is_compiled_together_once(monkeypatch):
    x, asked = np.ones(3, np.float32), []
    double, half = jax.jit(lambda x: x * 2), jax.jit(lambda x: x / 2)
    monkeypatch.setattr(device_loop, "_ready", set())
    monkeypatch.setattr(device_loop, "compile_all", lambda programs: asked.append(list(programs)))
    for _ in range(2):
        make_ready("a text", lambda: {"double": (double, x), "half": (half, x)})
    make_ready("a longer one", lambda: {"double": (double, x), "half": (half, np.ones(4))})  # which its call compiles
    assert asked == [["double", "half"]]


def test_an_error_need_not_wait_for_what_compiles_beside_it(monkeypatch):
    """Of a server that cannot begin: the other programs may take minutes yet."""
    begun, ends, left = threading.Event(), threading.Event(), []

    class Long:
        def lower(self):
            return self

        def compile(self):
            begun.set()
            assert ends.wait(60)

    class Wrong(Long):
        def compile(self):
            assert begun.wait(60)
            raise UserError("no memory")

    monkeypatch.setattr(interrupt, "_unfinished", [])
    monkeypatch.setattr(interrupt, "_leave", left.append)
    try:
        with pytest.raises(UserError, match="no memory"):
            compile_all({"long": (Long(),), "wrong": (Wrong(),)})
        interrupt.end_unless_done(2)
        assert left == [2], "the program ends without it, too"
    finally:
        ends.set()
        for thread in threading.enumerate():  # which tells that it has compiled, to a log that is open now
            if thread.name.startswith("sepjax-compile"):
                thread.join(60)
