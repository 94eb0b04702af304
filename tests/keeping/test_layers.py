"""Trials against masks written out, the search on tables of known worth, and the command that does it all."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import AttentionConfig, ConfigError, ModelConfig
from sepjax.evaluation.arms import parse_arms
from sepjax.generation.cache.mixed import bounded_sizes
from sepjax.keeping import held_out
from sepjax.keeping.held_out import TooLittleTextError, divide
from sepjax.keeping.layers import as_arm, plain_window, row_bytes, split_memory
from sepjax.keeping.search import choose_layers, choose_sizes, geometry_of, rank_layers, usual_sizes
from sepjax.keeping.trial import Geometry, Prepared, Row
from sepjax.model.rope import rope_table, rotate
from sepjax.programs import run_here
from sepjax.programs.common import one_arm
from tests.evaluation.conftest import byte_tokenizer  # noqa: F401
from tests.models import random_model

T, L = 256, 3
CONFIG = ModelConfig(
    vocab_size=257, num_layers=L, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32, max_positions=512
)
SETTINGS = AttentionConfig(num_sinks=2, window_size=8, watch_half_life=0, implementation="reference")
GEOMETRY = Geometry(num_sinks=2, kept=9, window=40, others=24)


@pytest.fixture(scope="module")
def model():
    """One for trials and for the command: its programs are compiled once."""
    return random_model(CONFIG, SETTINGS, seed=1, scale=8.0)


def log_p(model, ids, masks):
    """log p [T, V] of all tokens, dense attention under masks[L, K, T, T] written out."""
    tokens, i = jnp.asarray(ids[None, :-1]), jnp.arange(len(ids) - 1)
    turn = rope_table(i[None], CONFIG.rope, CONFIG.head_dim)

    def attend(q, k, v, mask):
        q, k = rotate(q, turn)[0], rotate(k, turn)[0]
        k, v, mask = (jnp.repeat(x, 2, axis=axis) for x, axis in ((k, 1), (v[0], 1), (mask, 0)))
        weights = jax.nn.softmax(jnp.where(mask, jnp.einsum("ihd,jhd->hij", q, k) / np.sqrt(8), -jnp.inf))
        return jnp.einsum("hij,jhd->ihd", weights, v)[None], weights

    hidden, weights = model(tokens, i[None], attend, jnp.asarray(masks))
    return np.asarray(jax.nn.log_softmax(model.logits(hidden)[0]), np.float64), np.asarray(weights)


def kept_until(looks, geometry):
    """int[T], played one choice after the other; looks[M, T] of every 32 tokens, without fading."""
    score, alive, until = np.zeros(T), np.ones(T, bool), np.full(T, 2**30)
    for now, look in zip(range(32, T + 1, 32), looks, strict=True):
        score = np.maximum(score, look)
        old = [j for j in range(geometry.num_sinks, now - geometry.window) if alive[j]]
        for j in sorted(old, key=lambda j: -score[j])[geometry.kept :]:
            alive[j], until[j] = False, now
    return until


def test_trials_are_passes_under_their_masks(model):
    size = 200
    ids = np.random.default_rng(0).integers(1, 257, size + 1).astype(np.int32)
    prepared = Prepared.create(model, size, SETTINGS)
    assert prepared.length == T
    row = Row.create(prepared, ids)
    until = np.asarray(row.until(GEOMETRY))
    i, j = np.arange(T)[:, None], np.arange(T)
    padded = np.pad(ids, (0, T - size))
    dense, weights = log_p(model, padded, np.broadcast_to(i >= j, (L, 2, T, T)))
    looks = np.where(i - j >= 16, weights, 0).reshape(L, 2, 2, T // 32, 32, T).max(axis=(2, 4))
    expected = np.array([[kept_until(x.astype(np.float16), GEOMETRY) for x in layer] for layer in looks])
    np.testing.assert_array_equal(until[..., :size], expected[..., :size])
    assert len(np.unique(until)) > 4

    base, states = row.run(np.array([False, False, True]), GEOMETRY, row.until(GEOMETRY))
    for keeps, first, before in (([0, 0, 1], 0, None), ([0, 1, 1], 1, states)):
        keeps = np.array(keeps, bool)
        window = np.where(keeps, GEOMETRY.window, GEOMETRY.others)[:, None, None, None]
        kept = keeps[:, None, None, None] & (i < until[:, :, None])
        found, _ = log_p(model, padded, (i >= j) & ((i - j < window) | (j < GEOMETRY.num_sinks) | kept))
        best = np.argsort(-dense, axis=1)[:size, :64]
        p, q = (np.exp(np.take_along_axis(x[:size], best, axis=1)) for x in (dense, found))
        p, q = (np.concatenate([x, 1 - x.sum(axis=1, keepdims=True)], axis=1) for x in (p, q))
        divergence, loss = row.run(keeps, GEOMETRY, row.until(GEOMETRY), first, before)[0]
        assert divergence == pytest.approx((p * np.log(p / q)).sum(), rel=1e-3)
        assert loss == pytest.approx(-found[np.arange(size), ids[1:]].sum(), rel=1e-5)
        assert divergence > 0.01
    assert base[0] == pytest.approx(row.run(np.array([False, False, True]), GEOMETRY, row.until(GEOMETRY))[0][0])
    everything = Geometry(2, 0, 0, T)
    assert row.run(np.zeros(L, bool), everything, row.until(everything))[0][0] == pytest.approx(0, abs=1e-3)


class Known(Row):
    """A row of which is known what layers are worth: of bool[L] and a geometry."""

    def __init__(self, worth, noise=0.0):
        for name, value in {"worth": worth, "noise": noise, "size": 1000, "runs": [0]}.items():
            object.__setattr__(self, name, value)

    def until(self, geometry):
        return jnp.zeros(())

    def run(self, keeps, geometry, until, first=0, states=None):
        self.runs[0] += 1
        found = 100 - self.worth(keeps, geometry) + self.noise * keeps.sum()
        return np.array([found, found]), jnp.zeros(())


def test_layers_are_chosen_one_beside_the_other():
    gain = np.zeros(12)
    gain[[2, 5, 7, 9]] = 8, 9, 7, 3

    def worth(keeps, geometry):
        return gain @ keeps - 7.5 * (keeps[2] & keeps[5])  # two layers that find the same

    rows = [Known(worth, noise) for noise in (-0.1, 0.0, 0.1, 0.2)]
    steps = choose_layers(rows, GEOMETRY, 12, 8, fixed=False)
    assert [x.layer for x in steps] == [5, 7, 9, 2]
    assert steps[0].gain == pytest.approx((9 - 0.05) / 1000)
    assert 0 < steps[0].error < 0.0001
    assert sum(row.runs[0] for row in rows) < 4 * 12 * 3  # all layers on all rows every time would be 4 * 12 * 5
    assert len(choose_layers(rows, GEOMETRY, 12, 6, fixed=True)) == 6
    assert choose_layers([Known(lambda keeps, geometry: -keeps.sum())] * 2, GEOMETRY, 12, 8, fixed=False) == []
    with pytest.raises(ConfigError, match="not finite"):
        choose_layers([Known(lambda *_: np.nan)], GEOMETRY, 12, 1, fixed=False)


def test_short_rows_rank_layers_alone():
    gain = np.arange(12) - 4.0  # the last gains most, the first five nothing
    unsure = np.where(np.arange(12) == 10, 20.0, 0.1)  # of layer 10 rows say all sorts

    def row(sign):
        return Known(lambda keeps, geometry: (gain + sign * unsure) @ keeps)

    rows = [row(sign) for sign in (1, -1, 1, -1)]
    steps = rank_layers(rows, GEOMETRY, 12, 4, fixed=False)
    assert [x.layer for x in steps] == [11, 9, 8]
    assert steps[0].gain == pytest.approx(0.007)
    assert steps[0].error == pytest.approx(0.0001 * np.sqrt(4 / 3) / 2)
    assert [row.runs[0] for row in rows] == [13, 8, 8, 8]  # a window for all, then twelve layers, then seven
    assert [x.layer for x in rank_layers(rows, GEOMETRY, 12, 4, fixed=True)] == [11, 10, 9, 8]
    one = rank_layers(rows[:1], GEOMETRY, 12, 9, fixed=False)
    assert ([x.layer for x in one], one[0].error) == ([10, 11, 9, 8, 7, 6, 5, 4], None)
    assert rank_layers([Known(lambda keeps, geometry: -keeps.sum())] * 2, GEOMETRY, 12, 8, fixed=False) == []
    with pytest.raises(ConfigError, match="not finite"):
        rank_layers([Known(lambda *_: np.nan)], GEOMETRY, 12, 1, fixed=False)


def test_sizes_are_tried_in_the_same_bytes():
    config = ModelConfig(num_layers=12, num_heads=2, num_kv_heads=1, head_dim=64, embed_dim=128)

    def worth(keeps, geometry):  # best: three layers, others of 507 entries, 3/8 of the slots kept
        return -abs(keeps.sum() - 3) - abs(geometry.others - 507) / 100 - abs(geometry.kept - 700) / 1000

    tried = choose_sizes([Known(worth)], [9, 4, 7, 0], config, 800, AttentionConfig())
    best = tried[0]
    assert best.attention.kept_layers == (4, 7, 9)
    assert (best.others, best.zone) == (0.625, 0.375)
    assert best.divergence == min(x.divergence for x in tried)
    budget = row_bytes(config, plain_window(800, AttentionConfig(), 12))
    assert all(0.97 * budget < row_bytes(config, x.attention) <= budget for x in tried)
    only = choose_sizes([Known(worth)], [9, 4, 7, 0], config, 800, AttentionConfig(), 2)
    assert {x.attention.kept_layers for x in only} == {(4, 9)}
    usual = usual_sizes([9, 4, 7], config, 800, AttentionConfig())
    assert usual.kept_layers == (4, 7, 9)
    assert 0.97 * budget < row_bytes(config, usual) <= budget
    assert usual.max_separators == usual.cache_size // 4


def test_memory_is_split_as_asked_for():
    config, layers = ModelConfig(num_layers=30), (15, 17, 18, 20, 21, 23, 24)
    split = split_memory(config, layers, 800, AttentionConfig(num_sinks=4))
    sizes = bounded_sizes(config, split)
    assert {sizes.parts[part].slots for part in sizes.part_of} == {640, 1408}
    assert geometry_of(split) == Geometry(4, split.max_separators, split.window_size, 635)
    assert geometry_of(split, 0.25) == Geometry(4, 176, 164, 159)
    odd = AttentionConfig(num_sinks=1, watch_layers=(0, 1), kept_layers=(3,), keep_all_separators=True)
    window = plain_window(800, AttentionConfig(num_sinks=4), 30)
    assert (window.window_size, window.cache_size) == (827, 831)  # 800 entries take 832 slots
    for settings in (split, window):
        assert parse_arms(as_arm(settings), odd, 30, cached=True)[0].attention == settings
    shipped = one_arm("@smollm2_800", AttentionConfig(), 30)
    assert (shipped.kept_layers, shipped.cache_size) == (layers, 1457)
    assert np.mean([{0: 1457}.get(part, 600) for part in bounded_sizes(config, shipped).part_of]) <= 800
    for wrong, message in (((layers, 20), "no room for 4 sinks"), ((range(30), 800), r"30 of the.*choose 1 to 29")):
        with pytest.raises(ConfigError, match=message):
            split_memory(config, *wrong, AttentionConfig(num_sinks=4))
    for text, message in (
        ("@smollm2_80", "smollm2_800"),
        ("dense; dense", "another arm"),
        ("x: dense; dense", "2 arms"),
    ):
        with pytest.raises(ConfigError, match=message):
            one_arm(text, AttentionConfig(), 30)


def test_texts_are_dealt_to_choice_and_check(byte_tokenizer):  # noqa: F811
    sizes: dict[str, Any] = {
        "length": 30,
        "max_tokens": 90,
        "check_length": 40,
        "check_tokens": 80,
        "least": 20,
        "seed": 3,
    }
    texts = [chr(97 + n) * 70 for n in range(6)]

    def letters(stretches):
        return [set(byte_tokenizer.decode(x.tolist())) for x in stretches]

    divided = divide(byte_tokenizer, texts, **sizes)
    chosen, checked = letters(divided.rows), letters([x.targets for x in divided.documents])
    assert (len(chosen), len(checked)) == (3, 2)
    assert all(len(x) == 1 for x in chosen + checked)
    assert len(set.union(*chosen)) == 3  # a stretch of every text before the second of any
    assert not set.union(*chosen) & set.union(*checked)
    same = divide(byte_tokenizer, texts, **sizes)
    assert all(np.array_equal(a, b) for a, b in zip(divided.rows, same.rows, strict=True))
    assert letters(divide(byte_tokenizer, texts, **sizes | {"seed": 4}).rows) != chosen
    halves = divide(byte_tokenizer, ["a" * 100 + "b" * 100], **sizes)
    assert (letters(halves.rows), letters([x.targets for x in halves.documents])) == ([{"a"}] * 3, [{"b"}] * 2)
    other = divide(byte_tokenizer, texts[:1], texts[1:3], **sizes)
    assert letters(other.rows) == [{"a"}] * 2
    with pytest.raises(TooLittleTextError, match=r"of which 1 stretches of 15 or more .* 1 of 20 or more"):
        divide(byte_tokenizer, texts[:1], **sizes)


def test_the_command_writes_what_wins(tmp_path, model, byte_tokenizer, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("sepjax.loading.load", lambda path: (model, byte_tokenizer))
    lead, scores, real = [0.1], [], held_out.score_streams

    def streams(model, tokenizer, documents, arms, **settings):
        """The window's score is real, once; the other cache has tests of its own, and costs as much again."""
        assert all(len(x.targets) <= 500 for x in documents)
        scores.append(scores[0] if scores else real(model, tokenizer, documents, arms[:1], **settings)[0])
        whole = dataclasses.replace(scores[0].slices[0], difference=-lead[0], difference_error=0.05)
        return [scores[0], dataclasses.replace(scores[0], arm="chosen", slices=(whole,))]

    monkeypatch.setattr(held_out, "score_streams", streams)
    text, out = tmp_path / "text.txt", tmp_path / "mine.arm"
    text.write_text("The quick brown fox, and the lazy dog. " * 60)
    flags = ["layers", f"--model={tmp_path}", f"--text={text}", f"--output={out}", "--max_tokens=500"]
    # of rows of four times the slots sizes are tried, of shorter ones they are the usual ones
    for lead[0], pattern, slots in ((0.1, "watched", 100), (0.04, "sink_window", 64)):
        run_here([*flags, f"--slots={slots}", "--layers=1", "--length=256", "--check_tokens=1000"])
        said = capsys.readouterr().out
        assert ("so these are the usual ones" in said) == (slots == 100)
        assert ("from the dense model, 1/1000 nats   loss" in said) == (slots == 64)
        assert f"--arm=@{out}" in said
        assert f"{-lead[0]:+.4f} +- 0.0500 nats a token beside the window, all" in said
        assert ("that does not beat" in said) == (pattern == "sink_window")
        attention = one_arm(f"@{out}", model.attention, L)
        assert attention.pattern == pattern
        assert row_bytes(CONFIG, attention) <= row_bytes(CONFIG, plain_window(slots, SETTINGS, L))
    for more, message in (
        (["--length=120"], "--length=120 must be 256 or more"),
        (["--layers=9"], "9 of the model's"),
        (["--slots=250"], "at least 1 and 2 are needed"),
    ):
        with pytest.raises(SystemExit):
            run_here([*flags, *more])
        assert message in capsys.readouterr().err
