"""What is seen of an object at a prompt or in a log: one line that says what it is, and no arrays."""

import dataclasses

import jax
import numpy as np
import pytest

from sepjax.attention.ranges import whole_rows
from sepjax.config import Config
from sepjax.data.batch import Batch
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.mixed import MixedCache, bounded_sizes, empty_cache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.sampling import Sampling
from sepjax.layout import build_layout
from sepjax.training.step import create_state
from tests.generation.tiny import ATTENTION, SHAPE, tiny_engine, tiny_model, tiny_tokenizer

IDS = np.zeros((2, 8), np.int32)
WORDS = "2 layers, 32 wide, 4 heads on 2 of keys, 320 tokens, float32; separator a=2 s=3 w=6 c=20"


def mixed() -> MixedCache:
    cache = empty_cache(SHAPE, 3, bounded_sizes(SHAPE, dataclasses.replace(ATTENTION, layer_windows=(4, 6))))
    assert isinstance(cache, MixedCache)
    return cache


OBJECTS = {
    "model": (tiny_model, f"Transformer({WORDS})"),
    "engine": (tiny_engine, f"Generator({WORDS})"),
    "what it prepared": (lambda: tiny_engine().prepared, "Prepared"),
    "tokenizer": (tiny_tokenizer, "Tokenizer(300 tokens, BOS 1, EOS 2)"),
    "stream": (
        lambda: tiny_engine().stream("One; two"),
        "Stream(0 tokens seen, at most 20 entries; separator a=2 s=3 w=6 c=20)",
    ),
    "bounded": (
        lambda: StreamingCache.create(SHAPE, 3, StreamSizes.create(SHAPE, ATTENTION)),
        "StreamingCache(3 x 2 layers a=2 s=3 w=6 c=20 float32, ",
    ),
    "by layer": (
        lambda: StreamingCache.create(SHAPE, 3, StreamSizes.create(SHAPE, ATTENTION), by_layer=True),
        "StreamingCache(3 x 2 layers a=2 s=3 w=6 c=20 float32, ",
    ),
    "of two sizes": (mixed, "MixedCache(3 x 1 layers a=2 s="),
    "growing": (
        lambda: SeparatorCache.create(SHAPE, 3, window_size=6, capacity=10),
        "SeparatorCache(3 x 2 layers room for 16 tokens, window 6 float32, ",
    ),
    "no arrays": (
        lambda: jax.tree.map(lambda x: None, SeparatorCache.create(SHAPE, 3, window_size=6, capacity=10)),
        "SeparatorCache(no arrays)",
    ),
    "layout": (lambda: build_layout(IDS > 0, window_size=4, num_sinks=1), "SeparatorLayout([2, 8], room for 8 packed"),
    "ranges": (lambda: whole_rows(build_layout(IDS > 0, window_size=4, num_sinks=1)), "Ranges(far_start=int32[2, 8], "),
    "batch": (lambda: Batch(IDS, IDS, IDS > 0, IDS, IDS, IDS > 0), "Batch(tokens=int32[2, 8], targets=int32[2, 8], "),
    "training": (
        lambda: jax.eval_shape(lambda: create_state(Config(model=SHAPE))),
        "TrainState(step=int32, params=<",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_prints_as_one_line_without_arrays(name):
    make, beginning = OBJECTS[name]
    made = make()
    text = repr(made)
    assert str(made) == text
    assert beginning in text, text
    assert "\n" not in text
    assert len(text) < 300, text
    assert "Array(" not in text, text
    assert "array(" not in text, text


def test_how_to_draw_prints_what_is_not_as_usual():
    hot = Sampling.create(0.7, 5, logit_bias={3: 1.0, 4: 2.0})
    assert repr(hot) == "Sampling(temperature=0.7, top_k=5, logit_bias of 2)"
    assert repr(Sampling.create()) == "Sampling(greedy)"
    assert repr(Sampling.of_rows([hot, hot], 2)) == "Sampling(2 rows)"
    assert repr(jax.tree.map(lambda x: None, hot)) == "Sampling(...)"


def test_a_saved_row_and_its_state_print_in_short():
    row = tiny_engine().stream("One; two").saved()
    assert repr(row) == f"SavedRow(0 tokens seen, {len(row.pending)} to be read)"
    assert "cache=StreamingCache(1 x 2 layers" in repr(row.state)
    assert len(repr(row.state)) < 300


def test_settings_in_words_say_how_a_cache_is_held():
    codes = dataclasses.replace(ATTENTION, cache_dtype="int8")
    assert codes.in_words() == "separator a=2 s=3 w=6 c=20 cache=int8"
    assert dataclasses.replace(codes, pattern="dense").in_words() == "dense cache=int8"
