"""The losses that a gate learns by, against what they are least at."""

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.config import AttentionConfig
from sepjax.keeping.lesson import _LOSSES, LOSSES, Rows

GATED = AttentionConfig("gated", num_sinks=0, window_size=8, gate_layer=1, gate_stretch=4, gate_keep=1)
FLOOR = 1e-6


def test_shares_are_learned_as_expected_worth():
    """Tokens that look alike and are needed in one text of eight, then sharply, count what they give on average."""
    random = np.random.default_rng(0)
    T, texts = 12, 64
    worth = np.full((texts, T), 0.3, np.float32) * random.uniform(0.9, 1.1, (texts, T)).astype(np.float32)
    worth[:, 0::4] = np.where(random.random((texts, 3)) < 0.125, 8.0, 1e-3)  # rarely, but much: 1.0 on average
    judged = np.ones((texts, T), bool)
    judged[:, 8:] = False  # says nothing, whatever it is
    worth[:, 8:] = 99.0
    rows = Rows(np.ones((texts, T), np.int32), np.zeros((texts, T, 1), np.float32), worth, judged)

    def learned(loss):
        def mean(scores):
            return _LOSSES[loss](jnp.broadcast_to(scores, (texts, T)), rows, attention=GATED, floor=FLOOR)

        scores, step = jnp.zeros(T), jax.jit(jax.value_and_grad(mean))
        for _ in range(400):
            least, gradient = step(scores)
            scores = scores - 2.0 * gradient
        return np.asarray(scores)[:8].reshape(2, 4), float(least)

    scores, least = learned("share")
    share = (worth[:, :8] + FLOOR).reshape(texts, 2, 4)
    share = (share / share.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(jax.nn.softmax(scores, axis=-1), share, atol=2e-3)
    np.testing.assert_allclose(least, -(share * np.log(share)).sum(-1).mean(), rtol=1e-3)
    assert scores[:, 0].mean() - scores[:, 1:].mean() > learned("log")[0][:, 0].mean() + 1  # which only sees the rarity
    assert set(LOSSES) == set(_LOSSES)
