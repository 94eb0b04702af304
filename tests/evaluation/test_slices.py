"""What stood in the row before, against brute force; arms as a user writes them."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.config import AttentionConfig, ConfigError
from sepjax.evaluation.arms import Arm, distances, fixed_arms, parse_arms, plain_arms
from sepjax.evaluation.equal import window_of_equal
from sepjax.evaluation.slices import EDGES, References, ScoredTokens, by_position, sliced
from sepjax.layout import build_layout
from sepjax.separators import flag_separators

ROWS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=2, max_size=30)), min_size=1)


@given(ROWS, st.integers(1, 6), st.integers(0, 6))
def test_slices_are_what_they_are_said_to_be(rows, near, more):
    """Rows of few tokens, so that bigrams repeat; several rows may be of one document."""
    rows.sort(key=lambda row: row[0])
    far, ids, documents = near + more, [np.array(row) for _, row in rows], [document for document, _ in rows]
    tokens = ScoredTokens.create([x[:-1] for x in ids], [x[1:] for x in ids], documents)
    masks = tokens.masks(near, far)
    at = 0
    for (document, row), number in zip(rows, range(len(rows)), strict=True):
        pairs = [*itertools.pairwise(row)]
        for i, pair in enumerate(pairs):
            before = [i - j for j in range(i) if pairs[j] == pair]
            ago = min(before, default=0)
            own = not any(pair in itertools.pairwise(r) for d, r in rows if d != document)
            expected = {
                "all": True,
                "unseen": not before,
                "near": 0 < ago <= near,
                "between": near < ago <= far,
                "far": ago > far,
                "far_own": ago > far and own,
            }
            assert {name: bool(mask[at]) for name, mask in masks.items()} == expected
            assert (tokens.row[at], tokens.document[at], tokens.before[at]) == (number, document, i + 1)
            at += 1
    assert at == len(tokens.row)


def test_a_book_beside_a_note_has_errors_over_rows():
    """Over documents they would be 0: the book has the mean."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, 4, 60) for _ in range(40)]
    documents = [0] * 39 + [1]
    losses = [random.normal(2, 0.1, 40 * 59) for _ in range(2)]
    tokens = [
        ScoredTokens.create([x[:-1] for x in ids], [x[1:] for x in ids], given) for given in (documents, [0] * 40)
    ]
    beside, alone = (sliced(x, losses, 1, References(0, None, None), 3, 8)[0] for x in tokens)
    assert beside.difference_error == alone.difference_error > 0.001


def test_what_is_recovered_and_its_error_over_documents():
    random = np.random.default_rng(0)
    ids = [random.integers(0, 4, 60) for _ in range(40)]
    tokens = ScoredTokens.create([x[:-1] for x in ids], [x[1:] for x in ids])
    dense = random.normal(2, 0.1, len(tokens.row))
    far = tokens.masks(3, 8)["far"]
    window = dense + np.where(far, 1.0, 0.0)
    half = dense + np.where(far, random.normal(0.5, 0.2, len(far)), 0.0)
    slices = sliced(tokens, [dense, window, half], 2, References(1, 0, 1), 3, 8)
    found = {x.name: x for x in slices}
    assert found["far"].recovered == pytest.approx(1 - np.mean(half[far] - dense[far]))
    assert found["far"].difference == pytest.approx(-found["far"].recovered)
    assert found["far"].recovered_error == pytest.approx(0.2 / np.sqrt(far.sum()), rel=0.4)
    assert found["near"].recovered is None  # the window loses nothing there
    assert sum(found["far"].document_tokens) == far.sum()
    positions = by_position(tokens, [dense, window, half], 2, References(1, None, 1))
    assert [x.name for x in positions][:2] == ["1-15", "16-22"]
    assert positions[0].tokens == 40 * 15
    assert {x.recovered for x in positions} == {None}
    inside = (tokens.before >= 16) & (tokens.before < EDGES[2])
    assert positions[1].loss == pytest.approx(half[inside].mean())


BASE = AttentionConfig(num_sinks=2, window_size=8, layer_windows=(8, 9, 8))


def test_arms_are_read(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([3, 5, 9], np.uint16))
    np.save(tmp_path / "table.npy", np.arange(9) % 4 == 1)
    (tmp_path / "table.json").write_text('{"separator_ids": [7, 8], "by": "rarity"}')
    text = f"""dense; sink_window n=657 c=0
        rare: separator n=256 ids=@{tmp_path}/ids.npy document_mask=false implementation=xla
        sink_window n=kv:rare; separator windows=6*2,40 a=0; fixed_interval every=7
        t: separator ids=@{tmp_path}/table.npy; u: separator separator_ids=@{tmp_path}/table.json model=runs/u
        v: separator ids=4,2 separators=paper implementation=none"""
    arms = parse_arms(text, BASE, 3)
    dense, window, rare, like, hybrid, interval, t, u, v = arms
    assert dense == Arm("dense", AttentionConfig(pattern="dense", num_sinks=2, window_size=8, layer_windows=(8, 9, 8)))
    assert (window.name, window.attention.window_size, window.attention.layer_windows) == (
        "sink_window n=657 c=0",
        657,
        (),
    )
    assert (rare.name, rare.attention.separators, rare.attention.separator_ids) == ("rare", "ids", (3, 5, 9))
    assert (rare.attention.document_mask, rare.attention.implementation) == (False, "xla")
    assert (like.equal, like.attention.layer_windows) == (("kv", "rare"), ())
    assert (hybrid.attention.layer_windows, hybrid.attention.num_sinks) == ((6, 6, 40), 0)
    assert (interval.attention.interval, t.attention.separator_ids, u.attention.separator_ids) == (7, (1, 5), (7, 8))
    assert (u.model, v.attention.separators, v.attention.implementation) == ("runs/u", "paper", None)
    assert [arm.name for arm in plain_arms([dense.attention, t.attention, u.attention])] == [
        "dense", "separator 1", "separator 2",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"arm 'sink_window n=kv:rare'.*is for windows of text"):
        fixed_arms("rare: separator; sink_window n=kv:rare", BASE, 3)
    (narrow,) = fixed_arms("separator c=99 cache=int8", BASE, 3, cached=True)
    assert narrow.attention == dataclasses.replace(BASE, cache_size=99, cache_dtype="int8")
    (tmp_path / "one.arm").write_text("separator n=7 a=1\n")
    (tmp_path / "two.arm").write_text("x: sink_window n=5;\ndense")
    files = parse_arms(f"@{tmp_path}/one.arm; @{tmp_path}/two.arm; other: @{tmp_path}/one.arm", BASE, 3)
    assert [(arm.name, arm.attention.window_size) for arm in files] == [
        ("one", 7),
        ("x", 5),
        ("dense", 8),
        ("other", 7),
    ]
    (shipped,) = fixed_arms("@smollm2_324", BASE, 30, cached=True)
    assert (shipped.name, shipped.attention.cache_size) == ("smollm2_324", 650)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ; ", "has no arm"),
        ("dense; seperator", r"arm 2, 'seperator': .*did you mean 'separator'"),
        ("separator windw=3", r"arm 1, 'separator windw=3': unknown field 'windw'.*did you mean 'windows'"),
        ("separator 12", "'12' is not field=value"),
        ("n=3 separator", "a pattern first"),
        ("x:", "a pattern first|not one of"),
        ("separator n=0", "window_size=0 must be 1 or more"),
        ("separator n=a", "n=a is wrong"),
        ("separator windows=3,4", "2 windows but the model has 3"),
        ("separator windows=3,,4", "whole numbers with commas"),
        ("separator document_mask=1", "true or false"),
        ("separator ids=@/no/such.npy", r"arm 1, .*no/such.npy"),
        ("separator ids=@{float}", "expected ids"),
        ("separator ids=@{text}", "no list of whole numbers"),
        ("dense; dense", "another arm 'dense'"),
        ("dense; separator cache=int8", "arm 2, .*cache=int8 is for bounded caches, and nothing is cached here"),
        ("separator n=9 c=99", "c=99 is for bounded caches, and nothing is cached here; leave it out"),
        ("sink_window s=9", "s=9 is for bounded caches"),
        ("separator stream_positions=absolute", "stream_positions=absolute is for bounded caches"),
        ("dense; @/no/such.arm", "arm '@/no/such.arm': cannot read '/no/such.arm': No such file.*sepjax has smollm2_"),
        ("@{empty}", "empty.arm' has no arm; expected some, a line each"),
        ("@{float}", "float.npy' is not a text"),
        ("separator n=x", "n=x is wrong: expected a whole number"),
        ("separator q=3", "unknown field 'q'; expected one of a, c, .*or a field of attention"),
        ("@smollm2_80", "did you mean 'smollm2_800'"),
        ("x: @{arms}", "has 2 arms, which cannot all have one name"),
        ("separator cache=int4", "cache_dtype='int4' is not one of"),
        ("dense n=64", "arm 1, 'dense n=64': window_size does nothing for the dense pattern"),
        ("x: separator; dense n=kv:x", "'dense' lets the model choose or keeps all; give n itself"),
        ("sink_window n=kv:x; x: separator", "no arm 'x' further to the front, only none"),
    ],
)
def test_arms_that_cannot_be_read_are_named(text, message, tmp_path):
    np.save(tmp_path / "float.npy", np.ones(3))
    (tmp_path / "ids.json").write_text('["a"]')
    (tmp_path / "two.arm").write_text("dense; separator")
    (tmp_path / "empty.arm").write_text(" ;\n")
    for name, file in (("float", "float.npy"), ("text", "ids.json"), ("arms", "two.arm"), ("empty", "empty.arm")):
        text = text.replace(f"{{{name}}}", f"{tmp_path}/{file}")
    with pytest.raises(ConfigError, match=message):
        parse_arms(text, BASE, 3)


def test_distances_are_those_of_the_windows_unless_given():
    arms = [
        x.attention for x in parse_arms("dense; separator n=30; sink_window n=50; separator windows=9,9,99", BASE, 3)
    ]
    assert distances(arms, 3, 99) == (9, 50)  # 99 sees everything
    assert distances(arms, 3, 1000) == (9, 99)
    assert distances(arms[1:3], 3, 1000, far=20) == (20, 20)
    assert distances(arms[:1], 3, 1000) == (1000, 1000)
    assert distances(arms, 3, 1000, near=40, far=60) == (40, 60)
    with pytest.raises(ConfigError, match="--near=40 exceeds --far=20"):
        distances(arms, 3, 1000, near=40, far=20)


@pytest.mark.parametrize("pattern", ["separator", "sink_window", "fixed_interval"])
def test_windows_of_equal_cost_are_the_nearest(pattern, byte_tokenizer):
    attention = AttentionConfig(pattern=pattern, num_sinks=3, interval=5, separators="ids", separator_ids=(7, 9))
    rows = [np.random.default_rng(n).integers(1, 12, n + 1) for n in (60, 25)]
    table = np.isin(np.arange(257), attention.separator_ids)

    def layout(ids, n):
        flags = flag_separators(ids[None, :-1], np.arange(len(ids) - 1)[None], table, attention)
        return build_layout(np.asarray(flags), window_size=n, num_sinks=3)

    for kind, want in (("kv", 0.4), ("pairs", 0.6)):
        found, costs = window_of_equal(attention, byte_tokenizer, rows, kind, want).window_size, {}
        for n in (found - 1, found, found + 1):  # the cost grows with n
            layouts = [layout(ids, n) for ids in rows]
            keys = [int(x.keys_per_query()[0, -1]) / x.length for x in layouts]
            pairs = [sum(int(x.with_window(m).num_pairs()[0]) for x in layouts) for m in (n, 99)]
            costs[n] = abs((np.mean(keys) if kind == "kv" else pairs[0] / pairs[1]) - want)
        assert costs[found] == pytest.approx(min(costs.values()))
