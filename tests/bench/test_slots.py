"""The benchmark of slots on a shape that takes no time."""

import pytest

from sepjax.bench.slots import KINDS, measure
from sepjax.config import Config
from tests.generation.tiny import ATTENTION, ROWS, SHAPE, tiny_tokenizer


@pytest.mark.soak  # 15 s; a server's launches are measured in test_serve.py
def test_every_kind_of_request_gets_a_figure():
    config = Config(model=SHAPE, attention=ATTENTION)  # whose programs other tests have, too
    figures = list(measure(config, ATTENTION, tiny_tokenizer(), [ROWS], seconds=0.0))
    assert [(x.kind, x.rows) for x in figures] == [(kind, ROWS) for kind in KINDS]
    for x in figures:
        assert x.tokens_per_second == pytest.approx(ROWS / x.milliseconds * 1e3), "a token of each row every step"
        assert x.share_of_loop == pytest.approx(x.loop_milliseconds / x.milliseconds)
