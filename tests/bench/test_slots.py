"""The benchmark of slots on a shape that takes no time."""

import pytest

from sepjax.bench.slots import KINDS, measure
from sepjax.bench.steps import caches_of
from tests.bench.test_steps import CONFIG
from tests.generation.tiny import tiny_tokenizer


def test_every_kind_of_request_gets_a_figure():
    (attention,) = caches_of(CONFIG.attention, 2, "2/3/6/20", 0).values()
    figures = list(measure(CONFIG, attention, tiny_tokenizer(), [2], seconds=0.0))
    assert [(x.kind, x.rows) for x in figures] == [(kind, 2) for kind in KINDS]
    for x in figures:
        assert x.tokens_per_second == pytest.approx(2 / x.milliseconds * 1e3), "two tokens every step"
        assert x.share_of_loop == pytest.approx(x.loop_milliseconds / x.milliseconds)
