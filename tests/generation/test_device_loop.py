"""What the compiled loop does with memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import AttentionConfig, ModelConfig
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.device_loop import DecodeState, Request, make_advance
from sepjax.generation.sampling import Sampling
from sepjax.model.unrolled import by_layer
from tests.models import random_split

CONFIG = ModelConfig(vocab_size=64, num_layers=6, embed_dim=32, mlp_dim=64, num_heads=2, num_kv_heads=2, head_dim=16)
STREAM = AttentionConfig(num_sinks=4, max_separators=64, window_size=256, cache_size=2000)


@pytest.mark.soak  # programs of six layers; that nothing grows while it streams is in test_stream.py
@pytest.mark.parametrize("kind", ["growing", "bounded"])
def test_the_cache_is_updated_in_place(kind):
    """Its bytes are those of the donated argument, and a step copies few layers' slots at most, never the whole."""
    graph, params = random_split(CONFIG, None)
    if kind == "growing":
        attention, copies = AttentionConfig(), 2  # one layer's keys and values
        cache = SeparatorCache.create(CONFIG, 2, window_size=64, capacity=2048)
    else:
        # Turning keys back, once in thousands of tokens, makes new ones of all layers: half of the cache.
        attention, copies, params = STREAM, CONFIG.num_layers / 2 + 2, by_layer(params, CONFIG)
        cache = StreamingCache.create(CONFIG, 2, StreamSizes.create(CONFIG, STREAM), by_layer=True)
    state = DecodeState.create(cache, jax.random.split(jax.random.key(0), 2), 64)
    request = Request(jnp.zeros(64, bool), Sampling.create(), jnp.full(1, -1), jnp.int32(9))
    program = make_advance(graph, attention, 4).lower(params, state, np.zeros(2, bool), request).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < copies * cache.nbytes / CONFIG.num_layers
