"""What the suites of all implementations measure with: inputs, a brute force, random layouts, and the 2x rule.

The tolerance is derived, not chosen: an implementation may err at most twice as much as the textbook formula computed
in the same precision, plus one rounding of the largest term that the result sums up.
"""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from sepjax.attention.ranges import Ranges
from sepjax.layout import build_layout

RESULTS = ("out", "lse", "dq", "dk", "dv")
SCALED_RESULTS = (*RESULTS, "d_scale")


def examples(count):
    """So many random examples where each is expensive; HYPOTHESIS_PROFILE=search tries as many as ever."""
    return settings(max_examples=count if settings.default.max_examples <= 25 else settings.default.max_examples)


def tensors(shape, dtype=jnp.float32, seed=0):
    """q, k, v and the cotangents of out and lse."""
    B, T, N, K, H = shape
    draw = np.random.default_rng(seed).standard_normal
    q, k, v, d_out = (jnp.asarray(draw((B, T, heads, H)), dtype) for heads in (N, K, K, N))
    return q, k, v, d_out, jnp.asarray(draw((B, T, N)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def results(op, q, k, v, d_out, d_lse, layout):
    """RESULTS of an implementation."""
    outputs, vjp = jax.vjp(lambda q, k, v: op(q, k, v, layout), q, k, v)
    return *outputs, *vjp((d_out, d_lse))


@functools.partial(jax.jit, static_argnums=0)
def scaled_results(op, q, k, v, d_out, d_lse, layout, far_scale):
    """SCALED_RESULTS of an implementation."""
    outputs, vjp = jax.vjp(lambda q, k, v, s: op(q, k, v, layout, far_scale=s), q, k, v, far_scale)
    return *outputs, *vjp((d_out, d_lse))


def equations(jaxpr):
    """Every equation of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


def brute_force(q, k, v, d_out, d_lse, mask, dtype=np.float64):
    """RESULTS by the textbook formulas, every operation in `dtype`."""
    q, k, v, d_out, d_lse = (np.asarray(x).astype(dtype) for x in (q, k, v, d_out, d_lse))
    heads_per_key, scale = q.shape[2] // k.shape[2], dtype(q.shape[3] ** -0.5)
    keys, values = (np.repeat(x, heads_per_key, axis=2) for x in (k, v))
    mask = np.asarray(mask)[:, None]
    sees_some = mask.any(-1, keepdims=True)
    scores = np.where(mask, np.einsum("bthd,bshd->bhts", q, keys) * scale, -np.inf)
    top = np.where(sees_some, scores.max(-1, keepdims=True), 0)
    total = np.where(sees_some, np.exp(scores - top).sum(-1, keepdims=True), 1)
    p = np.exp(scores - top) / total
    lse = np.where(sees_some, top + np.log(total), -np.inf)[..., 0].swapaxes(1, 2)

    dp = np.einsum("bthd,bshd->bhts", d_out, values)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + d_lse.swapaxes(1, 2)[..., None]) * scale
    dk, dv = np.einsum("bhts,bthd->bshd", ds, q), np.einsum("bhts,bthd->bshd", p, d_out)
    dk, dv = (x.reshape(*k.shape[:3], heads_per_key, -1).sum(3) for x in (dk, dv))
    return np.einsum("bhts,bshd->bthd", p, values), lse, np.einsum("bhts,bshd->bthd", ds, keys), dk, dv


def brute_force_scaled(q, k, v, d_out, d_lse, layout, far_scale, dtype=np.float64):
    """SCALED_RESULTS: every key twice, with its own value for who sees it near, a scaled one for who sees it far."""
    far, near = (np.asarray(x) for x in layout.as_masks())
    v, factor = np.asarray(v).astype(dtype), np.asarray(far_scale).astype(dtype)[..., None, None]
    keys, values = np.concatenate([k, k], axis=1), np.concatenate([v, v * factor], axis=1)
    out, lse, dq, dk, dv = brute_force(q, keys, values, d_out, d_lse, np.concatenate([near, far], axis=2), dtype)
    (near_dk, far_dk), (near_dv, far_dv) = (np.split(x, 2, axis=1) for x in (dk, dv))
    return out, lse, dq, near_dk + far_dk, near_dv + far_dv * factor, (far_dv * v).sum((2, 3))


def largest_terms(q, k, v, d_out, d_lse):
    """For each of RESULTS the size of the terms that it sums up; they may cancel, their rounding does not."""
    q, k, v, d_out = (np.abs(np.asarray(x).astype(np.float64)).max(axis=(0, 1, 2)) for x in (q, k, v, d_out))
    score, d_score = (q @ k) * len(q) ** -0.5, (d_out @ v + np.abs(d_lse).max()) * len(q) ** -0.5
    return v.max(), score, d_score * k.max(), d_score * q.max(), d_out.max(), d_out @ v


def assert_errs_at_most_twice_as_much(got, plain, exact, terms, dtype=jnp.float32):
    """`plain` is the textbook formula in the precision of `dtype`; all hold RESULTS, or all SCALED_RESULTS."""
    names, terms = SCALED_RESULTS[: len(got)], terms[: len(got)]
    for name, x, y, z, term in zip(names, got, plain, exact, terms, strict=True):
        x, y, z = (np.asarray(a).astype(np.float64) for a in (x, y, z))
        finite = np.isfinite(z)
        np.testing.assert_array_equal(x[~finite], z[~finite], err_msg=name)
        error, allowed = (np.max(np.abs(a[finite] - z[finite]), initial=0) for a in (x, y))
        floor = float(jnp.finfo(dtype).eps) * term
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, textbook formula {allowed:.3g} ({floor:.3g})"


def check(got, inputs, mask, part=slice(None)):
    """float32 against float64; `part` is of which rows and tokens `got` is."""
    plain, exact = (brute_force(*inputs, mask, dtype) for dtype in (np.float32, np.float64))
    assert_errs_at_most_twice_as_much(got, [x[part] for x in plain], [x[part] for x in exact], largest_terms(*inputs))


def check_scaled(op, inputs, layout, plain=None):
    """The 2x rule for far_scale; `plain`: the definition in the dtype of the inputs, None: textbook in float32."""
    far_scale = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, layout.far_start.shape), jnp.float32)
    exact = brute_force_scaled(*inputs, layout, far_scale)
    got = scaled_results(op, *inputs, layout, far_scale)
    if plain is None:
        plain_results = brute_force_scaled(*inputs, layout, far_scale, np.float32)
    else:
        plain_results = scaled_results(plain, *inputs, layout, far_scale)
    terms = [2 * x for x in largest_terms(*inputs)]  # the largest factor
    assert_errs_at_most_twice_as_much(got, plain_results, exact, terms, inputs[0].dtype)
    assert np.asarray(got[-1]).any(), "some token is used from afar"


@st.composite
def layouts(draw, shape):
    """Separators, documents and padding anywhere, seen or hidden; every n, a and reach that differ, some beyond T."""
    B, T = shape[:2]
    cuts = np.zeros((B, T), np.int32)
    for b, i in draw(st.lists(st.tuples(st.integers(0, B - 1), st.integers(0, T - 1)), max_size=6)):
        cuts[b, i] = 1
    ids = draw(st.permutations([0, 1, 2, 3])) if draw(st.booleans()) else [1] * 4  # one of four is padding
    n, reach = draw(st.integers(1, T + 2)), draw(st.integers(1, T + 2))
    layout = build_layout(
        draw(hnp.arrays(bool, (B, T))),
        window_size=n,
        num_sinks=draw(st.integers(0, 5) | st.just(T)),
        segment_ids=np.asarray(ids, np.int32)[np.cumsum(cuts, axis=1) % 4],
    )
    layout = layout.with_most_far(draw(st.sampled_from([T, T // 4])))
    return layout.with_reach(max(n, reach)) if draw(st.booleans()) else layout


@st.composite
def ranges(draw, shape):
    """Ranges of any kind, of rows, queries, near keys and far keys: few steps as of documents, many as of windows."""
    B, Q, near, far = shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def borders(most):
        steps = draw(st.sampled_from([1, 3, Q]))
        values = np.sort(rng.integers(0, most, (B, steps), endpoint=True, dtype=np.int32))
        return np.take_along_axis(values, np.sort(rng.integers(0, steps, (B, Q))), axis=1)

    def start_and_end(most):
        start = borders(most)
        return start, np.maximum(start, borders(most))  # empty in places

    num_far = rng.integers(0, far, B, endpoint=True, dtype=np.int32)
    far_start, far_end = (np.minimum(x, num_far[:, None]) for x in start_and_end(far))
    return Ranges(far_start, far_end, *start_and_end(near), num_far)


def ranges_mask(seen, near, far):
    """bool[B, Q, near + far]: who sees whom."""

    def seen_of(start, end, keys):
        j = np.arange(keys)
        return (np.asarray(start)[..., None] <= j) & (j < np.asarray(end)[..., None])

    parts = seen_of(seen.near_start, seen.near_end, near), seen_of(seen.far_start, seen.far_end, far)
    return np.concatenate(parts, axis=2)
