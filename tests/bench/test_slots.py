"""The benchmark of slots on a shape that takes no time."""

import dataclasses

import pytest

from sepjax.bench.slots import KINDS, measure
from sepjax.bench.steps import caches_of
from tests.bench.test_steps import CONFIG, MODEL


def test_every_kind_of_request_gets_a_figure():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=400))
    (attention,) = caches_of(config.attention, 2, "2/3/6/20", 0).values()
    figures = list(measure(config, attention, [2], seconds=0.0))
    assert [(x.kind, x.rows) for x in figures] == [(kind, 2) for kind in KINDS]
    for x in figures:
        assert x.tokens_per_second == pytest.approx(2 / x.milliseconds * 1e3), "two tokens every step"
        assert x.share_of_loop == pytest.approx(x.loop_milliseconds / x.milliseconds)
