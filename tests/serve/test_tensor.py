"""A server whose weights and caches are split over several devices answers as one on one device."""

import jax
import pytest

from sepjax import Generator
from sepjax.config import MeshConfig
from sepjax.measure import counted_compilations
from sepjax.model.transformer import merge, split
from sepjax.serve.running import Options, Running
from sepjax.serve.served import Served
from sepjax.sharding import make_mesh, parameter_shardings
from tests.generation.tiny import ATTENTION, ROWS, tiny_model, tiny_tokenizer
from tests.serve.test_conversations import complete, talk
from tests.serve.tiny import settled, tiny_served


@pytest.mark.soak  # whose programs are its own
def test_two_devices_answer_as_one(tmp_path):
    """Conversations that go on from rows that were kept, drawn ones too, in memory and on disk."""
    mesh, one = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2]), tiny_served()

    def load():  # in the worker's thread, which has no mesh of its own
        with jax.set_mesh(mesh):
            graph, params = split(tiny_model())
            params = jax.device_put(params, parameter_shardings(params, mesh))
            return Served.create("tiny", Generator(merge(graph, params), tiny_tokenizer(), ATTENTION), None)

    options = Options(rows=ROWS, steps=3, state=str(tmp_path / "state"), device_memory=3 * one.row_bytes)
    ids, expected = [], None
    for number in range(2):
        with Running(load, options) as server:
            complete(server, [3, 4])  # what saves rows to disk is compiled then
            with counted_compilations() as compiled:
                for size in (70, 71):
                    complete(server, [9 + number] * size, n=2)
            assert compiled == []
            ids = talk(server, one, 2, temperature=1.2, seed=2, prompt=ids, expected=expected)
            expected = len(ids) - 1
            assert settled(server)
            rows = server.worker.slots._device.rows.state.cache.entries
            assert {len(x.sharding.device_set) for x in rows} == {2}
            assert sum(x.addressable_shards[0].data.nbytes for x in rows) * 2 == sum(x.nbytes for x in rows)
