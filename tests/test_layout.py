"""SeparatorLayout against the sentence that defines it (METHOD section 1), written a second time in NumPy."""

import dataclasses

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.layout import SeparatorLayout, build_layout


def documents(segment_ids, document_mask):
    """Document number (-1: padding) and position in it of every token of a row, by walking along it."""
    number, position, count = [], [], -1
    seen_text = False
    for i, s in enumerate(segment_ids):
        seen_text |= s != 0
        is_token = s != 0 if document_mask else seen_text
        starts = is_token and (i == 0 or number[-1] == -1 or (document_mask and s != segment_ids[i - 1]))
        count += starts
        number.append(count if is_token else -1)
        position.append(0 if starts or not is_token else position[-1] + 1)
    return np.array(number), np.array(position)


def brute_force(is_separator, segment_ids, n, a, document_mask=True):
    """bool[B, T, T]: who sees whom."""
    rows = []
    for separator, ids in zip(is_separator, segment_ids, strict=True):
        document, position = documents(ids, document_mask)
        i, j = np.ogrid[: len(ids), : len(ids)]
        same = (document[:, None] == document) & (document[:, None] >= 0)
        rows.append(same & (j <= i) & (separator | (position < a) | (i - j <= n - 1)))
    return np.stack(rows)


@st.composite
def batches(draw):
    """Rows of documents and padding anywhere, with separators anywhere: (is_separator, segment_ids)."""
    shape = draw(st.sampled_from([(1, 1), (2, 20)]))
    is_separator = draw(hnp.arrays(bool, shape))
    pieces = draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 2)))
    lengths = draw(st.integers(1, 8))  # runs of equal ids, so that documents are longer than a token or two
    segment_ids = np.repeat(pieces, lengths, axis=1)[:, : shape[1]]
    return is_separator, segment_ids


windows, sinks = st.integers(1, 30), st.integers(0, 30)


@given(batches(), windows, sinks, st.booleans())
def test_mask_is_the_definition(batch, n, a, document_mask):
    is_separator, ids = batch
    layout = build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=ids, document_mask=document_mask)
    np.testing.assert_array_equal(layout.as_mask(), brute_force(is_separator, ids, n, a, document_mask))


@given(batches(), windows, sinks)
def test_ranges_hold_exactly_the_visible_keys_once(batch, n, a):
    is_separator, ids = batch
    layout = build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=ids)
    mask = brute_force(is_separator, ids, n, a)
    for b, i in np.ndindex(ids.shape):
        far = layout.global_index[b, layout.far_start[b, i] : layout.far_end[b, i]]
        near = range(int(layout.near_start[b, i]), i + 1)
        assert sorted([*far.tolist(), *near]) == np.flatnonzero(mask[b, i]).tolist()


@given(batches(), windows, sinks)
def test_ranges_never_decrease_and_packed_keys_increase(batch, n, a):
    is_separator, ids = batch
    layout = build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=ids)
    for name in ("far_start", "far_end", "near_start", "global_count", "document_start"):
        assert (np.diff(getattr(layout, name), axis=1) >= 0).all(), name
    T = ids.shape[1]
    for row, count in zip(np.asarray(layout.global_index), np.asarray(layout.num_global), strict=True):
        assert (np.diff(row[:count]) > 0).all()
        assert (row[:count] < T).all()
        assert (row[count:] == T).all()


@given(batches(), windows, sinks)
def test_padding_sees_nothing(batch, n, a):
    is_separator, ids = batch
    layout = build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=ids)
    padding = ids == 0
    np.testing.assert_array_equal(np.asarray(layout.keys_per_query())[padding], 0)
    np.testing.assert_array_equal(np.asarray(layout.far_start)[padding], np.asarray(layout.far_end)[padding])
    np.testing.assert_array_equal(np.asarray(layout.near_start)[padding], np.nonzero(padding)[1] + 1)
    assert not np.asarray(layout.is_global())[padding].any()


@given(batches(), windows, sinks)
def test_statistics_count_the_mask(batch, n, a):
    is_separator, ids = batch
    layout = build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=ids)
    mask = brute_force(is_separator, ids, n, a)
    causal = brute_force(is_separator, ids, ids.shape[1], 0)
    np.testing.assert_array_equal(layout.num_pairs(), mask.sum((1, 2)))
    np.testing.assert_array_equal(jax.jit(SeparatorLayout.num_pairs)(layout), mask.sum((1, 2)))
    np.testing.assert_allclose(layout.attention_fraction(), mask.sum() / max(causal.sum(), 1), rtol=1e-6)
    kept = []
    for b, row in enumerate(ids):
        number, position = documents(row, True)
        last = [np.flatnonzero(number == d)[-1] for d in range(number.max() + 1)]
        kept += [mask[b, i].sum() / (position[i] + 1) for i in last]
    np.testing.assert_allclose(layout.kv_kept(), np.mean(kept) if kept else 0.0, rtol=1e-6)


@given(batches(), windows, windows, sinks)
def test_another_window_is_as_if_built_with_it(batch, n, other, a):
    is_separator, ids = batch

    def build(n):
        return build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=ids)

    seen_through = build(n).with_window(other)
    traced = jax.jit(SeparatorLayout.with_window)(build(n), jnp.int32(other))
    for name, expected in vars(build(other)).items():
        np.testing.assert_array_equal(getattr(seen_through, name), expected, err_msg=name)
        np.testing.assert_array_equal(getattr(traced, name), expected, err_msg=name)


@given(batches(), windows, windows, sinks)
def test_nothing_beyond_the_reach_is_seen_whatever_is_kept(batch, n, reach, a):
    is_separator, ids = batch
    n = min(n, reach)
    layout = build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=ids)
    i = np.arange(ids.shape[1])
    expected = brute_force(is_separator, ids, n, a) & (i[:, None] - i < reach)
    traced = jax.jit(SeparatorLayout.with_reach)(layout, jnp.int32(reach))
    for seen in (layout.with_reach(reach), traced):
        np.testing.assert_array_equal(seen.as_mask(), expected)
        np.testing.assert_array_equal(seen.num_pairs(), expected.sum((1, 2)))
        assert all((np.diff(x, axis=1) >= 0).all() for x in (seen.far_start, seen.far_end, seen.near_start))
    sinks_alone = brute_force(np.zeros_like(is_separator), ids, n, a) & (i[:, None] - i < reach)
    np.testing.assert_array_equal(layout.with_most_far(a).with_reach(reach).as_mask(), sinks_alone)


@given(batches(), windows, sinks)
def test_as_many_far_keys_as_sinks_are_the_sinks(batch, n, a):
    is_separator, ids = batch
    some = build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=ids).with_most_far(a)
    none = build_layout(np.zeros_like(is_separator), window_size=n, num_sinks=a, segment_ids=ids)
    if not is_separator[:, :1].any() or a:  # a separator within the first a tokens is a sink
        np.testing.assert_array_equal(some.as_mask(), none.as_mask())


@given(batches(), sinks, st.integers(0, 30))
def test_capacity_keeps_the_first_keys_and_knows_when_some_are_missing(batch, a, capacity):
    is_separator, ids = batch
    full = build_layout(is_separator, window_size=3, num_sinks=a, segment_ids=ids)
    layout = full.with_capacity(capacity)
    T = ids.shape[1]
    expected = np.pad(full.global_index, ((0, 0), (0, max(capacity - T, 0))), constant_values=T)[:, :capacity]
    np.testing.assert_array_equal(layout.global_index, expected)
    assert layout.capacity == capacity
    assert bool(layout.overflows()) == (int(full.num_global.max()) > capacity)
    for name in ("num_global", "far_start", "far_end", "near_start", "as_mask"):
        value, before = (getattr(x, name) for x in (layout, full))
        np.testing.assert_array_equal(*(x() if callable(x) else x for x in (value, before)), err_msg=name)


def test_too_small_a_capacity_raises_outside_jit_and_is_known_inside():
    flags = np.ones((2, 8), bool)
    with pytest.raises(ValueError, match="has 8 sinks and separators but capacity=7; raise capacity to 8"):
        build_layout(flags, window_size=1, num_sinks=0, capacity=7)
    built = jax.jit(lambda flags: build_layout(flags, window_size=1, num_sinks=0, capacity=7))(flags)
    assert bool(built.overflows())
    assert not bool(build_layout(flags, window_size=1, num_sinks=0, capacity=8).overflows())


def test_the_paper_s_attention_fraction():
    """a = 3, n = 64, T = 2048 without separators: 6.43 % of the causal pairs."""
    layout = build_layout(np.zeros((1, 2048), bool), window_size=64, num_sinks=3)
    assert round(100 * float(layout.attention_fraction()), 2) == 6.43


def row(text):
    """One row from a picture: "." a token, "|" a separator, "_" padding, a space before a new document."""
    tokens = text.replace(" ", "")
    starts = np.cumsum([len(piece) for piece in text.split(" ")])[:-1]
    ids = 1 + np.isin(np.arange(len(tokens)), starts).cumsum()
    separator = np.array([c == "|" for c in tokens])
    return separator[None], np.where([c == "_" for c in tokens], 0, ids).astype(np.int32)[None]


CASES = {
    "n = 1": ("..|..|..|...", 1, 1),
    "n = T": ("..|..|..|...", 12, 1),
    "n far above T": ("..|..|..|...", 2**40, 1),
    "a = 0": ("..|..|..|...", 2, 0),
    "a = T": ("..|..|..|...", 2, 12),
    "a far above T": ("..|..|..|...", 2, 2**40),
    "no separators": ("............", 2, 1),
    "only separators": ("||||||||||||", 2, 0),
    "T = 1": (".", 1, 0),
    "T = 1, all at once": ("|", 1, 1),
    "a separator among the sinks": (".|....|.....", 2, 3),
    "left padding": ("___..|..|...", 2, 2),
    "padding on both sides": ("__.|....|.._", 2, 1),
    "several documents": ("..|. .|... |...", 2, 1),
    "documents with padding between": ("..|. __.| .|__", 2, 1),
    "only padding": ("____________", 2, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_edge_case(name):
    text, n, a = CASES[name]
    is_separator, ids = row(text)
    layout = build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=ids)
    np.testing.assert_array_equal(layout.as_mask(), brute_force(is_separator, ids, n, a))


def test_a_window_of_n_holds_the_query_and_the_n_minus_1_before_it():
    mask = np.asarray(build_layout(np.zeros((1, 9), bool), window_size=4, num_sinks=0).as_mask())[0]
    assert mask[8, 8 - 3]
    assert not mask[8, 8 - 4]


def test_a_separator_is_an_ordinary_query():
    flags = np.zeros((1, 9), bool)
    flags[0, 6] = True
    mask = np.asarray(build_layout(flags, window_size=2, num_sinks=1).as_mask())[0]
    assert np.flatnonzero(mask[6]).tolist() == [0, 5, 6]


def test_the_official_row_wise_behaviour():
    """Documents see each other, one set of sinks a row; leading padding shifts them, other padding counts as text."""
    is_separator, ids = row("__... __.|...")
    layout = build_layout(is_separator, window_size=2, num_sinks=1, segment_ids=ids, document_mask=False)
    mask = np.asarray(layout.as_mask())[0]
    assert np.flatnonzero(mask[9]).tolist() == [2, 8, 9]
    assert np.flatnonzero(mask[6]).tolist() == [2, 5, 6]
    assert not mask[:2].any()


def test_without_ids_a_row_is_a_document():
    flags = np.random.default_rng(0).random((2, 20)) < 0.2
    alone = build_layout(flags, window_size=3, num_sinks=1)
    for document_mask in (True, False):
        ids = np.ones((2, 20), np.int32)
        layout = build_layout(flags, window_size=3, num_sinks=1, segment_ids=ids, document_mask=document_mask)
        jax.tree.map(np.testing.assert_array_equal, layout, alone)


def test_the_same_inside_jit():
    flags = np.random.default_rng(0).random((2, 20)) < 0.2

    def build(flags, n):
        return build_layout(flags, window_size=n, num_sinks=2)

    jax.tree.map(np.testing.assert_array_equal, jax.jit(build)(flags, 3), build(flags, 3))


def test_a_batch_of_no_rows():
    layout = build_layout(np.zeros((0, 4), bool), window_size=2, num_sinks=1, capacity=2)
    assert layout.as_mask().shape == (0, 4, 4)
    assert layout.num_pairs().shape == (0,)
    assert float(layout.attention_fraction()) == float(layout.kv_kept()) == 0.0


def test_is_rebuilt_around_leaves_that_are_no_arrays():
    """`eval_shape`, trees of shardings and custom derivatives do this, under the type checker of the tests too."""
    layout = build_layout(np.zeros((2, 4), bool), window_size=2, num_sinks=1)
    shapes = jax.eval_shape(lambda: build_layout(np.zeros((2, 4), bool), window_size=2, num_sinks=1))
    assert jax.tree.map(lambda x: x.shape, layout) == jax.tree.map(lambda x: x.shape, shapes)
    names = [field.name for field in dataclasses.fields(SeparatorLayout)]
    assert len(jax.tree.leaves(layout)) == len(names)


@pytest.fixture
def unchecked(monkeypatch):
    """Calls as users make them, without the type checker of the tests, which would refuse bad shapes first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 2, 4), {}, r"bool\[B, T\], or bool\[T\] of one example, with T >= 1, got bool\[2, 2, 4\]"),
        ((2, 0), {}, r"with T >= 1, got bool\[2, 0\]"),
        ((2, 4), {"segment_ids": np.ones((1, 4), np.int32)}, r"int32\[2, 4\], of is_separator's.*got int32\[1, 4\]"),
        ((2, 4), {"window_size": 0}, "window_size=0 must be 1 or more"),
        ((2, 4), {"num_sinks": -1}, "num_sinks=-1 must be 0 or more"),
        ((2, 4), {"capacity": -1}, "capacity=-1 must be 0 or more"),
    ],
)
def test_bad_input(shape, settings, message):
    with pytest.raises(ValueError, match=message):
        build_layout(np.zeros(shape, bool), **{"window_size": 2, "num_sinks": 1} | settings)


def test_another_window_must_hold_the_query():
    layout = build_layout(np.zeros((1, 4), bool), window_size=2, num_sinks=1)
    with pytest.raises(ValueError, match="window_size=0 must be 1 or more"):
        layout.with_window(0)
