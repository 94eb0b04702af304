"""A model and a tokenizer that take no time, for all tests of generation and of what is built on it.

What takes time is compiling, and a program is of one shape: of the model, the pattern and the rows. So tests share this
shape, these patterns and this number of rows, in batches and in slots, wherever others would prove no more.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from sepjax import Generator
from sepjax.config import AttentionConfig, ModelConfig
from sepjax.data.tokenizer import Tokenizer, train_sentencepiece
from sepjax.generation.row import StreamEvent
from sepjax.model.transformer import Transformer, merge
from tests.models import random_split

TEXTS = ["The cat sat on the mat, and looked.", "Où est-il? It ran away!", "One; two: three. Four, five."] * 3
SHAPE = ModelConfig(vocab_size=320, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
# Prompts by the definition of the op, which compiles in half the time; by the best one in cache/test_growing_pass.py.
ATTENTION = AttentionConfig(num_sinks=2, max_separators=3, window_size=6, cache_size=20, implementation="reference")
GATED = AttentionConfig(
    "gated",
    num_sinks=2,
    max_separators=16,
    window_size=6,
    gate_layer=1,
    gate_stretch=6,
    gate_keep=3,
    implementation="reference",
)
ROWS = 4
LONG = "One; two: three. Four, five. The cat sat on the mat, and looked. Où est-il?"


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return train_sentencepiece(TEXTS, 300)


def tiny_model(shape: ModelConfig = SHAPE, attention: AttentionConfig = ATTENTION) -> Transformer:
    """A random model whose attention matters, unlike at the initial scale, and that seldom spells in bytes."""
    graph, params = random_split(shape, attention, 3, scale=8)
    embedding = np.array(params["embedding"]["embedding"])
    embedding[3:259] *= 0.3
    params["embedding"]["embedding"] = jnp.asarray(embedding)
    return merge(graph, params)


@functools.cache
def tiny_engine(**attention: object) -> Generator:
    """The same for all who ask for the same pattern."""
    return Generator(tiny_model(), tiny_tokenizer(), dataclasses.replace(ATTENTION, **attention))


def uncounted(events: Sequence[StreamEvent]) -> list[StreamEvent]:
    """Events of slots as those of streams are: these do not count what is kept between the first and the newest."""
    return [event._replace(cache=event.cache._replace(kept=None)) for event in events]
