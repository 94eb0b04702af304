"""The benchmark of reading on a shape that takes no time."""

import dataclasses

import pytest

from sepjax.bench.reading import measure, stream
from sepjax.bench.steps import caches_of
from sepjax.config import Config, ConfigError, DataConfig, ModelConfig

MODEL = ModelConfig(vocab_size=300, num_layers=1, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
CONFIG = Config(model=MODEL, data=DataConfig(tokenizer_vocab_size=300))


def test_every_shape_gets_a_figure():
    caches = caches_of(CONFIG.attention, 1, "2/3/6/20", 0)
    for slots in (0, 4):
        (x,) = measure(CONFIG, caches, ["2x8"], slots, seconds=0.01)
        assert (x.name, x.shape) == ("separator 2/3/6/20", "2x8")
        assert 0 < x.tokens < 16, "up to the rows' next compactions"
        assert x.tokens_per_second == pytest.approx(x.tokens / x.milliseconds * 1e3)


@pytest.mark.soak  # a stream's programs, which evaluation/test_streaming.py has
def test_books_are_streamed():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=1024))
    (x,) = stream(config, caches_of(CONFIG.attention, 1, "2/3/6/20", 0), tokens=60, books=2)
    assert x.shape == "stream"
    assert x.tokens_per_second > 0


def test_shapes_that_mean_nothing():
    for shape, slots, said in (("2*8", 0, "like 32x128"), ("0x8", 0, "like 32x128"), ("8x8", 4, "--slots=4")):
        with pytest.raises(ConfigError, match=said):
            next(measure(CONFIG, {}, [shape], slots, seconds=0.01))
