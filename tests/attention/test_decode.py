"""One token over the slots of a cache: the Hopper kernel, simulated, against the definition; who is served by what."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention import decode
from sepjax.attention.target import Target
from sepjax.generation.cache.stored import quantised
from tests.attention.common import assert_errs_at_most_twice_as_much
from tests.attention.simulator import assert_no_races, simulate

HOPPER = Target("gpu", "NVIDIA H200", 132, "9.0")
seen_slots = jax.jit(decode.seen_slots, static_argnames=("kernel", "part"))  # thirty operations


def tensors(B: int, K: int, Z: int, G: int, C: int, H: int, dtype=jnp.bfloat16) -> tuple[Any, Any, Any, Any, Any]:
    """queries (large, so that weights differ), own key and value, keys and values of the cache."""
    shapes = (B, K, Z, G, H), (B, K, H), (B, K, H), (B, K, C, H), (B, K, C, H)
    drawn = np.random.default_rng(0)
    q, k, v, k_cache, v_cache = (jnp.asarray(drawn.standard_normal(shape, np.float32), dtype) for shape in shapes)
    return 2 * q, k, v, k_cache, v_cache


def visible_slots(B, C):
    """Rows that see half of their slots, but for a long stretch in their middle; one slot; and of three rows none."""
    seen = np.random.default_rng(1).random((B, C)) < 0.5
    seen[:, C // 3 : C // 3 + 140] = False
    seen[1], seen[-1] = False, np.arange(C) == C - 3
    return jnp.asarray(seen)


def textbook(queries, k, v, k_cache, v_cache, seen, ends, own=-1):
    """float64, slot by slot's own query; and the largest weight of a slot among a key head's queries."""
    queries, k, v, k_cache, v_cache = (np.asarray(x, np.float64) for x in (queries, k, v, k_cache, v_cache))
    ends = np.broadcast_to(np.asarray(ends, np.int32), (len(queries), queries.shape[2] - 1))
    zone = np.sum(ends[:, :, None] <= np.arange(k_cache.shape[2]), axis=1)
    own_queries = np.take_along_axis(queries, zone[:, None, :, None, None], axis=2)
    scores = np.einsum("bkcgh,bkch->bkgc", own_queries, k_cache)
    scores = np.where(np.asarray(seen)[:, None, None], scores, -np.inf)
    own = np.einsum("bkgh,bkh->bkg", queries[:, :, own], k)[..., None]
    scores = np.concatenate([scores, own], axis=-1) * k.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bkgc,bkch->bkgh", weights, np.concatenate([v_cache, v[:, :, None]], axis=2))
    return out, weights[..., :-1].max(axis=2)


def given_of(told, found):
    """The result, and the looks of slots if there are some."""
    out, looks = found
    return [out] if looks is None else [out, told.in_slots(looks)]


def assert_as_exact(got, plain, exact, seen):
    """The result by the 2x rule, and the looks, where there are some, of what is seen alone."""
    assert_errs_at_most_twice_as_much(got[:1], plain[:1], exact[:1], [np.abs(exact[0]).max()], jnp.bfloat16)
    for looks in got[1:]:
        assert_errs_at_most_twice_as_much([looks], plain[1:], exact[1:], [np.abs(exact[1]).max()], jnp.float32)
        np.testing.assert_array_equal(np.asarray(looks) > 0, np.broadcast_to(seen[:, None], looks.shape))


# (B, K, G, C, H), ends of zones, SMs, whether looks are asked for. With few rows for the SMs, or more scores than a
# block keeps, blocks share the slots of a row.
CASES = {
    "three zones, three heads a key head": ((3, 1, 3, 384, 64), (4, 68), 1, True),
    "one zone, blocks that share a row": ((2, 1, 4, 448, 64), (), 4, True),
    "no looks": ((2, 1, 3, 512, 64), (4,), 1, False),
    "heads of 128, zones that are empty": ((2, 2, 8, 320, 128), (4, 4), 1, True),
    "blocks that share a row, no looks": ((2, 1, 4, 448, 64), (), 4, False),
    "heads of 256, more than eight of them": ((2, 1, 12, 320, 256), (0, 70), 1, False),
    "more slots than scores are kept of": ((2, 1, 12, 640, 128), (4, 68), 1, True),
}
ALWAYS = ("blocks that share a row, no looks",)  # the others with -m soak: zones and looks are those of codes, below


@pytest.mark.parametrize("case", [pytest.param(x, marks=[] if x in ALWAYS else [pytest.mark.soak]) for x in CASES])
def test_the_kernel_equals_the_definition(case, monkeypatch):
    (B, K, G, C, H), ends, num_sms, looks = CASES[case]
    given, seen = tensors(B, K, len(ends) + 1, G, C, H), visible_slots(B, C)
    exact = textbook(*given, seen, ends)

    def run(kernel):
        told = seen_slots(seen, kernel=kernel, part=16)
        return given_of(told, decode.attend(*given, told, ends, looks=looks))

    plain = run(kernel=False)
    simulate(monkeypatch)
    monkeypatch.setattr(decode, "target", lambda: Target("gpu", "two SMs", num_sms, "9.0"))
    kernel: Any = decode._kernel
    kernel.clear_cache()
    got = run(kernel=True)
    kernel.clear_cache()  # a simulated program is of no use to others
    assert_no_races()
    assert_as_exact(got, plain, exact, seen)


def turned_by(q, k, v, Z):
    """Queries [B, K, 1, G, H] turned at random for each of Z zones, the key [B, K, H] by the last; both before they are
    rounded; and what turns them.
    """
    B, _, _, _, H = q.shape
    angles = np.random.default_rng(3).uniform(0, 2 * np.pi, (Z, B, H // 2)).astype(np.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def turned(x):  # [B, K, any, G, H] for each zone
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        c, s = (jnp.swapaxes(x, 0, 1)[:, None, :, None] for x in (cos, sin))
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    flat = jnp.concatenate([q.reshape(B, -1, H), k, v], axis=1)
    exact = turned(q), turned(k[:, :, None, None])[:, :, -1, 0]
    return *(x.astype(q.dtype) for x in exact), exact, decode.Turn(cos, sin, flat)


@pytest.mark.parametrize("H", [64, pytest.param(128, marks=pytest.mark.soak)])
def test_the_kernel_turns_queries_and_key_and_writes_the_token(H, monkeypatch):
    """From one array of all projections; the token goes to a slot that nobody sees yet."""
    K, G = (2, 3) if H == 64 else (1, 6)
    tensor, seen, ends = tensors(3, K, 1, G, 128, H), visible_slots(3, 192)[:, 64:], (4, 68)
    (q, k, v), cache = tensor[:3], tensor[3:]
    turned, key, _, turn = turned_by(q, k, v, len(ends) + 1)
    told = seen_slots(seen, kernel=False)
    given = turned, key, v, *cache
    plain = given_of(told, decode.attend(*given, told, ends, looks=True))
    simulate(monkeypatch)
    monkeypatch.setattr(decode, "target", lambda: Target("gpu", "one SM", 1, "9.0"))
    told = seen_slots(seen, kernel=True, part=16)
    assert told.turns(q.shape, H, looks=True)
    assert not told.turns(q.shape, H // 2, looks=True), "of half a head's numbers"
    assert not told.turns((*q.shape[:3], 9, 64), 64, looks=True), "of more heads of 64 than a product has columns"
    assert not told.turns((3, 2, 1, 8, 128), 128, looks=True), "of 20 heads of 128"
    to = jnp.asarray([np.flatnonzero(~row)[i] for i, row in enumerate(np.asarray(seen))], jnp.int32)

    found, written = decode.attend_and_write(q, v, v, *cache, told, ends, turn, to, looks=True)
    got = given_of(told, found)
    kernel: Any = decode._kernel
    kernel.clear_cache()
    assert_no_races()
    assert_as_exact(got, plain, textbook(*given, seen, ends), seen)
    for new, old, own in zip(written, cache, (key, v), strict=True):
        np.testing.assert_array_equal(new, old.at[jnp.arange(3), :, to].set(own))


def coded(B, K, Z, G, C, H):
    """queries, own key and value, codes and scales of keys and of values; some vectors are all zero."""
    q, k, v, *vectors = tensors(B, K, Z, G, C, H)
    stored = [quantised(jnp.asarray(x, jnp.float32).at[:, :, 5].set(0)) for x in vectors]
    return (q, k, v, *(x.codes for x in stored)), tuple(x.scales for x in stored)


def ends_of(B, C):
    """Ends of five zones, of which some are empty, begin in one tile or are a slot long."""
    drawn = np.random.default_rng(2)
    ends = np.sort(np.concatenate([np.full((B, 1), 4), drawn.integers(4, 70, (B, 1)), np.full((B, 1), 70)], axis=1))
    ends = np.concatenate([ends, drawn.integers(70, C, (B, 1))], axis=1)
    ends[0], ends[-1] = [4, 4, 70, 70], [4, 5, 70, 71]
    return ends.astype(np.int32)


# (B, K, G, C, H), whether there are several zones, SMs, whether looks are asked for
CODED = {
    "zones, a block for three key heads": ((3, 3, 3, 256, 64), True, 1, True),
    "blocks that share a row": ((2, 1, 4, 448, 64), True, 4, True),
    "heads of 128, more than eight of them": ((2, 1, 12, 320, 128), True, 1, False),
    "heads of 256": ((2, 2, 3, 192, 256), True, 1, False),
    "heads of 256, one zone": ((2, 2, 3, 192, 256), False, 1, True),
}
CODED_SOAK = list(CODED)[1:]


@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.soak] if x in CODED_SOAK else []) for x in CODED])
def test_the_kernel_of_codes_equals_the_definition(case, monkeypatch):
    (B, K, G, C, H), several, num_sms, looks = CODED[case]
    (q, k, v, keys, values), (of_keys, of_values) = coded(B, K, 5 if several else 1, G, C, H)
    seen, ends, own = visible_slots(B, C), ends_of(B, C) if several else (), 3 if several else 0
    wide = [np.asarray(x, np.float64)[..., None] for x in (of_keys, of_values)]
    exact_keys, exact_values = (np.asarray(x, np.float64) * of for x, of in zip((keys, values), wide, strict=True))
    exact = textbook(q, k, v, exact_keys, exact_values, seen, ends, own)

    def form(keys, values, kernel):
        told, told_ends = seen_slots(seen, kernel=kernel), jnp.asarray(ends) if several else ()
        given = q, k, v, keys, values, told, told_ends, (of_keys, of_values)
        return given_of(told, decode.attend(*given, own=own, looks=looks))

    plain = form(keys.astype(q.dtype), values.astype(q.dtype), kernel=False)
    simulate(monkeypatch)
    monkeypatch.setattr(decode, "target", lambda: Target("gpu", "few SMs", num_sms, "9.0"))
    kernel: Any = decode._kernel_of_codes
    kernel.clear_cache()
    got = form(keys, values, kernel=True)
    kernel.clear_cache()
    assert_no_races()
    assert_as_exact(got, plain, exact, seen)


@pytest.mark.parametrize("size", [16, decode.TILE])
def test_only_live_parts_are_read(size):
    """The number of tiles that they make; they, in order, and the last again; and where each is, if anywhere."""
    seen = np.zeros((3, 256), bool)
    seen[1, [3, 60, 255]], seen[2] = True, True
    told = seen_slots(jnp.asarray(seen), kernel=True, part=size)
    bias, live, place = (np.asarray(x) for x in (told.bias, told.live, told.place))
    parts, X = seen.reshape(3, -1, size), 256 // size
    for row, some in enumerate(parts):
        (numbers,) = np.nonzero(some.any(axis=1))
        count = len(numbers)
        assert live[row, 0] == -(-count * size // decode.TILE)
        np.testing.assert_array_equal(live[row, 1 : 1 + count], numbers)
        assert set(live[row, 1 + count :]) <= {numbers[-1] if count else 0}
        np.testing.assert_array_equal(
            place[row], [np.searchsorted(numbers, x) if x in numbers else X for x in range(X)]
        )
        is_seen = bias[row].reshape(parts[0].shape) == 0
        np.testing.assert_array_equal(is_seen[:count], some[numbers])
        assert not is_seen[count:].any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"implementation": "mosaic_gpu"}, None),
        ({"implementation": "xla"}, "asks for plain XLA"),
        ({"dtype": jnp.float32}, "computes in bfloat16 or float16, got float32"),
        ({"dtype": jnp.int8}, None),
        ({"dtype": jnp.int16}, "computes in bfloat16 or float16, got int16"),
        ({"slots": 100}, "reads 64 slots at a time, the cache has 100"),
        ({"head_dim": 80}, "serves head sizes 64, 128, 256, got 80"),
        ({"device": Target("cpu", "cpu")}, "needs an NVIDIA Hopper GPU"),
    ],
)
def test_who_is_served(change, reason, monkeypatch):
    asked = {"dtype": jnp.bfloat16, "head_dim": 64, "slots": 128, "device": HOPPER} | change
    device = asked.pop("device")
    monkeypatch.setattr(decode, "target", lambda: device)
    said = decode.unsupported(**asked)
    assert said is None if reason is None else reason in str(said)


# Heads of 256: of many queries there is no room for two tiles besides, and before that, of looks, none for scores.
@pytest.mark.parametrize(
    ("G", "Z", "codes", "is_served", "splits"),
    [
        (16, 3, False, True, 1),
        (24, 3, False, True, 2),
        (40, 3, False, False, None),
        (48, 3, False, False, None),
        (16, 5, True, True, 1),
        (32, 5, True, True, 2),
        (48, 5, True, False, None),
    ],
)
def test_what_a_block_has_room_for(G, Z, codes, is_served, splits, monkeypatch):
    monkeypatch.setattr(decode, "target", lambda: HOPPER)
    seen = seen_slots(jnp.ones((2, 640), bool), kernel=True)
    assert seen.told_to((2, 1, Z, G, 256), jnp.bfloat16, codes=codes).kernel == is_served
    assert not seen.told_to((2, 1, Z, 1, 64), jnp.float32, codes=codes).kernel
    if is_served:
        assert decode._stages_and_splits((300, 1, Z, G, 256, 640), 2, codes=codes, looks=True) == (2, splits)


def test_many_blocks_read_parts(monkeypatch):
    monkeypatch.setattr(decode, "target", lambda: HOPPER)
    assert decode.part_of(256 * 3, codes=False) == decode.part_of(760 * 8, codes=True) == decode.TILE
    assert decode.part_of(760 * 3, codes=False) == 16


def test_a_mesh_of_several_devices_is_not_served(monkeypatch):
    monkeypatch.setattr(decode, "target", lambda: HOPPER)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert "the mesh has several" in str(decode.unsupported(jnp.bfloat16, 64, 128))


# (B, K, G, C, H), ends, looks, codes: many rows, a block each; few, whose blocks share a row.
ON_A_GPU = {
    "400 rows, heads of 64": ((400, 3, 3, 896, 64), (4, 68), True, False),
    "600 rows, heads of 128": ((600, 2, 4, 896, 128), (4, 68), False, False),
    "two rows, heads of 128": ((2, 8, 4, 896, 128), (4, 68), False, False),
    "two rows, heads of 64, looks": ((2, 3, 3, 832, 64), (4, 68), True, False),
    "300 rows of codes": ((300, 1, 3, 896, 64), (), True, True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU)
def test_the_kernel_on_a_gpu(case):
    """The 2x rule, and the same bits again. What the kernel turns it may round the other way than XLA does."""
    (B, K, G, C, H), zones, looks, of_codes = ON_A_GPU[case]
    seen, own = visible_slots(B, C), -1
    given: Any = tensors(B, K, len(zones) + 1, G, C, H)
    scales, ends, how = None, zones, None
    numbers: Any = given[3:]
    if of_codes:
        given, scales = coded(B, K, 5, G, C, H)
        ends, own = jnp.asarray(ends_of(B, C)), 3
        numbers = [
            np.asarray(x, np.float64) * np.asarray(y, np.float64)[..., None]
            for x, y in zip(given[3:], scales, strict=True)
        ]
    turns, projected = B * K > 264 and not of_codes, (given[0][:, :, :1], given[1], given[2])
    unrounded = given[:2]
    if turns:
        q, key, unrounded, how = turned_by(*projected, Z=len(zones) + 1)
        given = q, key, *given[2:]
    to = jnp.argmin(seen, axis=1).astype(jnp.int32) if turns else None
    from_slots: Any = (*unrounded, given[2], *numbers, seen, ends, own)
    exact = textbook(*from_slots)

    def run(kernel):
        def attend(given, scales):
            told = seen_slots(seen, kernel=kernel, part=decode.part_of(B * K, codes=of_codes))
            q = given[0]
            cache: Any = given[3:] if kernel else [x.astype(q.dtype) for x in given[3:]]
            if turns and kernel:
                assert told.turns(q.shape, H, looks=looks)
                assert how is not None
                beside: Any = (*projected, *cache, told, ends, how, to)
                found, written = decode.attend_and_write(*beside, looks=looks)
                return given_of(told, found), written
            k, v = given[1:3]
            others: Any = (q, k, v, *cache, told, ends, scales)
            found = given_of(told, decode.attend(*others, own=own, looks=looks))
            if not turns:
                return found, []
            return found, [x.at[jnp.arange(B), :, to].set(own) for x, own in zip(cache, (k, v), strict=True)]

        return jax.jit(attend)(given, scales)

    (plain, cached), (got, written), again = run(kernel=False), run(kernel=True), run(kernel=True)
    assert_as_exact(got, plain, exact, seen)
    for x, y in zip(jax.tree.leaves((got, written)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(written, cached, strict=True):  # a turned key may be rounded the other way
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=2**-7, atol=1e-6)
