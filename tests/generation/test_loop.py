"""What the compiled loop does with memory."""

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.cache import SeparatorCache
from sepjax.config import AttentionConfig, ModelConfig
from sepjax.generation.loop import DecodeState, Request, make_advance
from sepjax.model.transformer import create, split
from sepjax.sampling import Sampling


def test_the_cache_is_updated_in_place():
    """Its bytes are those of the donated argument, and a step copies one layer's slots at most, never the whole."""
    config = ModelConfig(
        vocab_size=64, num_layers=8, embed_dim=32, mlp_dim=64, num_heads=2, num_kv_heads=2, head_dim=16
    )
    graph, params = split(create(config, None, jax.random.key(0)))
    cache = SeparatorCache.create(config, 2, window_size=64, capacity=2048)
    zeros = jnp.zeros(2, jnp.int32)
    state = DecodeState(cache, zeros, zeros, zeros > 0, jax.random.split(jax.random.key(0), 2))
    request = Request(jnp.zeros(64, bool), Sampling.create(), jnp.int32(-1), jnp.int32(9))
    program = make_advance(graph, AttentionConfig(), 4).lower(params, state, np.zeros(2, bool), request).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < 2 * cache.nbytes / config.num_layers
