"""Chunked cross-entropy with gradients of its own, against plain autodiff of the textbook formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sepjax.training import loss

B, T, D, V = 3, 12, 16, 50


def problem(seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    return hidden, head, rng.integers(0, V, (B, T)).astype(np.int32), rng.random((B, T)) < 0.7


def textbook(hidden, head, targets, mask, z_loss, softcap=0.0):
    logits = hidden @ head.T
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum((nll + z_loss * log_z**2) * mask), jnp.sum(nll * mask)


@pytest.fixture(params=[False, True], ids=["two reads", "one read"])
def reads_once(request, monkeypatch) -> bool:
    """How the gradient's program reads the logits: what GPUs do runs anywhere."""
    monkeypatch.setattr(loss, "_reads_once", lambda dtype: request.param)
    return request.param


# Of both z_loss, both ways to read and all chunks every pair; reads_once is the fixture's.
CHUNKS = {"one chunk": 2**28, "three chunks": B * V * 4, "a token a chunk": 1}


@pytest.mark.parametrize(
    ("reads_once", "elements", "z_loss"),
    [
        pytest.param(once, elements, z_loss, id=f"{name}-{'one read' if once else 'two reads'}")
        for number, (name, elements) in enumerate(CHUNKS.items())
        for once, z_loss in (((False, 0.0), (True, 1e-2)), ((False, 1e-2), (True, 0.0)))[number % 2]
    ],
    indirect=["reads_once"],
)
def test_equals_the_textbook_with_gradients(monkeypatch, reads_once, elements, z_loss):
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", elements)
    (sums, got), (expected_sums, expected) = sums_and_gradients(loss.cross_entropy_sums, z_loss), by_textbook(z_loss)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def sums_and_gradients(f, z_loss):
    """Both sums, and the gradients of three times the first."""
    hidden, head, targets, mask = problem()

    @jax.jit
    def run(hidden, head):
        sums, vjp = jax.vjp(lambda h, w: f(h, w, targets, mask, z_loss), hidden, head)
        return sums, vjp((jnp.float32(3.0), jnp.zeros_like(sums[1])))

    return run(hidden, head)


@functools.cache
def by_textbook(z_loss):
    return sums_and_gradients(textbook, z_loss)


def test_capped_logits_have_the_textbooks_gradients(reads_once):
    hidden, head, targets, mask = problem()

    def both(f):
        return jax.value_and_grad(lambda h, w: f(h, w, targets, mask, 1e-2, 2.0)[0], argnums=(0, 1))(hidden, head)

    (value, got), (expected_value, expected) = both(loss.cross_entropy_sums), both(textbook)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("far", [40.0, 100.0, 1e4], ids=["far", "past the exponentials' range", "very far"])
def test_targets_that_are_nearly_impossible_or_certain(reads_once, far):
    """One token's target is `far` below the largest logit; another's is that largest one, and its p rounds to 1."""
    hidden, head, targets, mask = problem()
    hidden = hidden.at[0, :2].set(0).at[0, :2, 0].set(1.0)
    head = head.at[7, 0].set(far + float(head[targets[0, 0], 0]))
    targets[0, 0], targets[0, 1], mask[0, :2] = (targets[0, 0] + (targets[0, 0] == 7)) % V, 7, True

    def both(f):
        return jax.value_and_grad(lambda h, w: f(h, w, targets, mask, 0.0)[0], argnums=(0, 1))(hidden, head)

    (value, got), (expected_value, expected) = both(loss.cross_entropy_sums), both(textbook)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * far + 1e-4)


def test_an_infinite_logit_is_not_hidden(reads_once):
    hidden, head, targets, mask = problem()
    head = head.at[7, 0].set(jnp.inf)
    value, gradient = jax.value_and_grad(lambda h: loss.cross_entropy_sums(h, head, targets, mask)[0])(hidden)
    assert not np.isfinite(value)
    assert not np.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_one_pass_equals_two(scale):
    """The largest logit and the sum beside it, also where all are equal and where one is far above the rest."""
    logits = scale * jnp.asarray(np.random.default_rng(0).normal(size=(B, T, V)), jnp.float32)
    logits = logits.at[0, 0].set(-3.0).at[0, 1, 7].set(1e30).at[0, 2].set(jnp.finfo(jnp.float32).min)
    top, total = loss._top_and_total_at_once(logits)
    expected_top, expected = loss._top_and_total(logits)
    np.testing.assert_array_equal(top, expected_top)
    np.testing.assert_allclose(total, expected, rtol=V * 2**-23)  # V additions, each rounded


def test_masked_targets_count_for_nothing(reads_once):
    hidden, head, targets, mask = problem()
    other = np.where(mask, targets, (targets + 1) % V)
    np.testing.assert_array_equal(
        loss.cross_entropy_sums(hidden, head, targets, mask), loss.cross_entropy_sums(hidden, head, other, mask)
    )

    def both(targets):
        return jax.value_and_grad(lambda h: loss.cross_entropy_sums(h, head, targets, mask)[0])(hidden)

    (a, da), (b, db) = both(targets), both(other)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(da[~mask], 0.0)
    np.testing.assert_allclose(da, db, atol=1e-6)


def test_chunks_bound_the_memory(monkeypatch):
    """No array as large as the whole batch's logits is left in the gradient's program."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", B * V * 2)
    hidden, head, targets, mask = problem()
    text = jax.jit(jax.grad(lambda h: loss.cross_entropy_sums(h, head, targets, mask)[0])).lower(hidden).as_text()
    assert f"{B}x2x{V}xf32" in text
    assert f"{B}x{T}x{V}xf32" not in text


def test_the_report_has_no_gradient():
    hidden, head, targets, mask = problem()
    gradient = jax.grad(lambda h: loss.cross_entropy_sums(h, head, targets, mask)[1])(hidden)
    np.testing.assert_array_equal(gradient, 0.0)


def test_bfloat16_hidden_keeps_a_float32_head_gradient(reads_once):
    hidden, head, targets, mask = problem()
    gradient = jax.grad(lambda w: loss.cross_entropy_sums(hidden.astype(jnp.bfloat16), w, targets, mask)[0])(head)
    exact = jax.grad(lambda w: textbook(hidden, w, targets, mask, 0.0)[0])(head)
    assert gradient.dtype == jnp.float32
    assert jnp.linalg.norm(gradient - exact) < 0.03 * jnp.linalg.norm(exact)  # bfloat16 keeps 8 bits: 2^-8 an input
