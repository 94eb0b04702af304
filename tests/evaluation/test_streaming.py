"""Streamed scores against sums over tokens taken one at a time, alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import AttentionConfig, ConfigError, ModelConfig, UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.arms import Arm
from sepjax.evaluation.documents import Document, Lanes, StreamError, documents_of, read_documents, whole_documents
from sepjax.evaluation.slices import EDGES
from sepjax.evaluation.streaming import score_streams
from sepjax.evaluation.token_loss import token_nll
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.bounded_pass import stream_pass
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.model.transformer import merge, split
from tests.models import random_model, random_split

ATTENTION = AttentionConfig(
    num_sinks=2, window_size=4, max_separators=3, cache_size=14, separators="ids", separator_ids=(ord("."), ord(" "))
)
SINKS = dataclasses.replace(ATTENTION, pattern="sink_window", window_size=12)
WATCHED = dataclasses.replace(ATTENTION, pattern="watched", watch_after=2)
TEXTS = ["A cat. A dog, a mat. The end of it, at last.\nNot yet.", "Short.", "", "Ünïcode is two bytes. " * 4]


class Bytes(Tokenizer):
    """A tokenizer whose tokens are bytes, with BOS 256."""

    bos_id, eos_id, vocab_size, adds_bos, document_end = 256, None, 257, True, None

    def __init__(self):
        pass

    def encode(self, text, *, bos=False):
        return [256] * bos + list(text.encode())

    def encode_flat(self, texts):
        ids = [np.array(self.encode(x), np.int32) for x in texts]
        return np.concatenate([np.zeros(0, np.int32), *ids]), np.array([*map(len, ids)])

    def token_texts(self):
        return [chr(i) for i in range(256)] + [None]

    def token_bytes(self, i):
        return bytes([i]) if i < 256 else b""


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=257, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32
    )
    graph, params = random_split(config, ATTENTION)
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, params)
    return merge(graph, jax.device_put(params, jax.devices()[0]))  # put there, as loaded ones are


@functools.partial(jax.jit, static_argnums=(0, 4))
def one_token(graph, params, cache, token, attention):
    table = jnp.isin(jnp.arange(257), jnp.array(attention.separator_ids)) & (attention.pattern == "separator")
    model = merge(graph, params)
    hidden, cache = stream_pass(model, cache, token[None, None], jnp.ones(1, jnp.int32), table, attention)
    return jax.nn.log_softmax(model.logits(hidden)[0, 0]), cache.compact()


def token_by_token(model, document, attention):
    """(-log p of every target, entries met by every token), one token at a time in a row of its own."""
    graph, params = split(model)
    cache = StreamingCache.create(model.config, 1, StreamSizes.create(model.config, attention))
    nll, held = [], []
    for token, target in zip(document.inputs, document.targets, strict=True):
        held.append(int(cache.held()[0]))
        scores, cache = one_token(graph, params, cache, np.int32(token), attention)
        nll.append(-float(scores[target]))
    return nll, held, int(cache.held()[0])


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(ATTENTION, id="separator"),
        pytest.param(SINKS, id="sink_window", marks=pytest.mark.soak),
        pytest.param(WATCHED, id="watched", marks=pytest.mark.soak),  # what it keeps: generation/cache/test_watched.py
    ],
)
def test_equals_a_loop_over_tokens_one_at_a_time(model, attention, monkeypatch):
    documents = documents_of(Bytes(), TEXTS)
    alone = [token_by_token(model, document, attention) for document in documents]
    nll, held = (np.concatenate([each[x] for each in alone]) for x in (0, 1))
    before = np.concatenate([np.arange(len(document.inputs)) + 1 for document in documents])
    kept = [last / len(document.inputs) for (_, _, last), document in zip(alone, documents, strict=True)]
    # Rows and chunks know no pattern: few and short ones for separators, all and long ones for the others.
    for rows, chunk, short in [(2, 5, 64) if attention is ATTENTION else (32, 0, 0)]:
        monkeypatch.setattr("sepjax.evaluation.streaming._SHORT", short)  # up to which layers are not scanned
        monkeypatch.setattr("sepjax.evaluation.streaming._PASSES", 3)  # so that the host looks more than once
        (score,) = score_streams(model, Bytes(), documents, [attention], rows=rows, chunk=chunk)
        size = sum(len(text.encode()) for text in TEXTS)
        assert score.tokens == score.bytes == size  # a byte a token; BOS is no target
        assert score.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)
        assert score.bits_per_byte == pytest.approx(nll.sum() / math.log(2) / size, rel=1e-4)
        assert score.slots_held == pytest.approx(held.mean(), rel=1e-6)
        assert score.slots_most == held.max() <= 14
        assert score.kv_kept == pytest.approx(np.mean(kept), rel=1e-5)
        assert score.compilations == 0
        assert sum(bucket.tokens for bucket in score.buckets) == size
        for bucket in score.buckets:
            inside = (before >= bucket.start) & (before < bucket.end)
            assert bucket.tokens == inside.sum()
            assert bucket.perplexity == pytest.approx(math.exp(nll[inside].mean()), rel=1e-4)
        assert (score.near, score.far) == (attention.window_size, 14)
        found, position = {x.name: x for x in score.slices}, 0
        for number, document in enumerate(documents):  # documents are dealt to rows, and their losses come back
            losses = nll[position : position + len(document.inputs)]
            position += len(losses)
            assert found["all"].document_nll[number] == pytest.approx(losses.sum(), rel=1e-4)
            pairs = [*zip(document.inputs, document.targets, strict=True)]
            far = [pair in pairs[: max(0, i - 14)] and pair not in pairs[i - 14 : i] for i, pair in enumerate(pairs)]
            assert found["far"].document_tokens[number] == sum(far)
            assert found["far"].document_nll[number] == pytest.approx(losses[far].sum(), rel=1e-4)


def test_a_rule_of_ones_own_decides_what_is_kept(model):
    """Told by a function, every second token is what is kept by position; the function sees a document with its BOS."""
    documents = documents_of(Bytes(), TEXTS)
    by_position = dataclasses.replace(ATTENTION, pattern="fixed_interval", interval=2)
    arms, seen = [Arm("position", by_position), Arm("mine", ATTENTION)], []

    def second(ids):
        seen.append(ids)
        return np.arange(len(ids)) % 2 == 1

    expected, score = score_streams(model, Bytes(), documents, arms, rows=2, keep={"mine": second})
    assert score.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert score.slots_held == expected.slots_held
    assert score.slices[0].document_nll == pytest.approx(expected.slices[0].document_nll, rel=1e-5)
    assert sorted(map(tuple, seen)) == sorted(tuple(document.inputs) for document in documents)
    for keep, message in (
        ({"other": second}, "keep has a rule for 'other', and arms are 'position', 'mine'"),
        ({"position": second}, "does nothing for pattern='fixed_interval', which has no separators"),
        ({"mine": lambda ids: ids[1:] > 0}, r"keep\['mine'\] gave bool\[\d+\] for document \d; expected bool\["),
        ({"mine": lambda ids: ids}, r"keep\['mine'\] gave int32\["),
    ):
        with pytest.raises(UserError, match=message):
            score_streams(model, Bytes(), documents, arms, keep=keep)


def test_bytes_are_one_rows_part_of_the_arrays(model, monkeypatch):
    """And of a large model that is given up one copy of the weights remains, though some streams scan its layers."""
    ways = iter([True, False])  # the first as above: the same program
    monkeypatch.setattr("sepjax.evaluation.streaming._layers_one_by_one", lambda *_: next(ways))
    monkeypatch.setattr("sepjax.generation.prepared._LARGE", 0)
    graph, params = split(model)
    model = merge(graph, jax.tree.map(jnp.copy, params))
    documents = documents_of(Bytes(), TEXTS)
    arms = [Arm("apart", ATTENTION), Arm("scanned", ATTENTION)]
    score, other = score_streams(model, Bytes(), documents, arms, rows=2, chunk=5, consume=True)
    assert other.perplexity == pytest.approx(score.perplexity, rel=1e-6)
    assert other.compile_seconds == score.compile_seconds > 0
    assert all(x.is_deleted() for x in jax.tree.leaves(split(model)[1]["layers"]))
    cache = StreamingCache.create(model.config, 2, StreamSizes.create(model.config, ATTENTION))
    assert score.cache_bytes == cache.nbytes // 2


def test_buckets_begin_with_the_first_token_and_grow_by_half_octaves():
    assert EDGES[:4] == (1, 16, 23, 32)
    assert EDGES[-1] > 2**20


def test_lanes_hold_every_document_once_and_end_together():
    random = np.random.default_rng(0)
    documents = whole_documents([random.integers(0, 99, n) for n in (50, 3, 20, 20, 9, 1, 17)], None)
    lanes = Lanes.create(documents, 32)
    assert len(lanes.inputs) == 3  # 117 tokens beside a document of 49 fill no fourth
    found = []
    for b in range(3):
        starts = [0, *lanes.ends[b, :-1].tolist()]
        found += [lanes.inputs[b, i:j].tolist() for i, j in zip(starts, lanes.ends[b].tolist(), strict=True) if j > i]
    assert sorted(found) == sorted(document.inputs.tolist() for document in documents if len(document.inputs))
    assert max(lanes.ends[:, -1]) == 49


def test_the_official_protocol_starts_every_line_anew_and_drops_its_last_token():
    (document,) = documents_of(Bytes(), ["ab\n\ncd"], line_wise=True)
    assert document.inputs.tolist() == [256, ord("a"), 256, ord("c")]
    assert document.targets.tolist() == [*b"abcd"]
    no_start = Bytes()
    no_start.bos_id = None
    with pytest.raises(StreamError, match="has none"):
        documents_of(no_start, ["a"], line_wise=True)


def test_documents_begin_with_bos_where_the_tokenizer_puts_it_and_once(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffab".encode())  # the UTF-8 mark is no text
    np.savez(tmp_path / "a.npz", with_bos=[256, 97, 98], without=[97, 98])
    adds, plain = Bytes(), Bytes()
    plain.adds_bos = False
    for tokenizer, expected in ((adds, [256, 97]), (plain, [97])):
        (document,) = read_documents(tmp_path / "a.txt", tokenizer)
        assert document.inputs.tolist() == expected
    first, second = read_documents(tmp_path / "a.npz", adds)
    assert first.inputs.tolist() == second.inputs.tolist() == [256, 97]


def test_the_first_tokens_are_taken():
    documents = documents_of(Bytes(), TEXTS, max_tokens=57)
    assert [len(document.inputs) for document in documents] == [53, 4]
    assert [len(document.inputs) for document in documents_of(Bytes(), TEXTS, max_tokens=62)] == [53, 6, 3]


def test_nothing_to_score_is_an_error(model):
    with pytest.raises(StreamError, match="no text to score"):
        score_streams(model, Bytes(), documents_of(Bytes(), ["", ""]), [ATTENTION])
    none = Document(np.zeros(0, np.int32), np.zeros(0, np.int32))
    with pytest.raises(StreamError, match="document 1 has no token to score; leave it out"):
        score_streams(model, Bytes(), [*documents_of(Bytes(), ["ab"]), none], [ATTENTION])
    with pytest.raises(ConfigError, match="keeps every token"):
        score_streams(model, Bytes(), documents_of(Bytes(), ["ab"]), [AttentionConfig(pattern="dense")])


def test_a_cache_that_keeps_every_separator_is_not_scored_beyond_its_room(model):
    attention = dataclasses.replace(ATTENTION, keep_all_separators=True)  # 14 - 2 - 4 of them
    documents = documents_of(Bytes(), ["." * 30, "ab" + "." * 8 + "abcdef"])
    with pytest.raises(ConfigError, match=r"no room for another separator.*cache_size=14 holds 8"):
        score_streams(model, Bytes(), documents, [attention], rows=2, chunk=5)


def test_losses_are_those_of_the_whole_logits(monkeypatch):
    random = np.random.default_rng(1)
    hidden, head = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 9, 8), (31, 8)))
    targets = random.integers(0, 31, (2, 9)).astype(np.int32)
    scores = jax.nn.log_softmax(hidden @ head.T)
    expected = -np.take_along_axis(np.asarray(scores), targets[..., None], axis=-1)[..., 0]
    for limit in (31, 31 * 7, 2**28):
        monkeypatch.setattr("sepjax.evaluation.token_loss._LOGITS", limit)
        np.testing.assert_allclose(token_nll(hidden, head, targets, ModelConfig()), expected, rtol=2e-5)


def test_losses_are_of_the_logits_as_the_model_divides_and_caps_them(model):
    config = dataclasses.replace(model.config, logit_divisor=2.0, final_softcap=10.0)
    scaled = random_model(config, ATTENTION)
    hidden = 400 * jax.random.normal(jax.random.key(1), (2, 3, config.embed_dim))
    targets = jnp.array([[0, 1, 2], [3, 4, 5]], jnp.int32)
    scores = jax.nn.log_softmax(scaled.logits(hidden))
    expected = -jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    found = token_nll(hidden, scaled.output_embedding(), targets, scaled.config)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    plain = token_nll(hidden, model.output_embedding(), targets, model.config)
    assert np.abs(plain - expected).max() > 0.1
