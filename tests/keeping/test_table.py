"""Worth of tokens against sums written out, and tables from the text to the model's folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.command.flags import parse
from sepjax.config import AttentionConfig, ConfigError, from_json_section
from sepjax.keeping.kinds import KINDS, far_attention_by_kind, kinds_of_ids
from sepjax.keeping.measure import best_ids, per_use, worth
from sepjax.keeping.table import TableError, measure_table, store
from sepjax.model.rope import rope_table, rotate
from sepjax.programs import run_here
from sepjax.separators import token_texts, with_ids
from tests.evaluation.conftest import byte_model, byte_tokenizer  # noqa: F401
from tests.models import random_model

ROWS = [np.random.default_rng(n).integers(1, 30, size).astype(np.int32) for n, size in ((0, 25), (1, 25))]
WINDOW = 6


def losses_and_looks(model, ids, scale):
    """-log p of all targets, and the squared weights that every place receives from afar, for values scaled by scale[T]
    where they are far; a head at a time.
    """
    tokens, T = jnp.asarray(ids[None, :-1]), len(ids) - 1
    positions = jnp.arange(T)[None]
    turn = rope_table(positions, model.config.rope, model.config.head_dim)
    far = np.arange(T)[:, None] - np.arange(T) >= WINDOW

    def attend(q, k, v, _):
        q, k, out, looks = rotate(q, turn)[0], rotate(k, turn)[0], [], 0.0
        for head in range(q.shape[1]):
            key = head * k.shape[1] // q.shape[1]
            scores = q[:, head] @ k[:, key].T / np.sqrt(q.shape[-1])
            weights = jax.nn.softmax(jnp.where(np.tri(T, dtype=bool), scores, -jnp.inf))
            looks += ((weights * far) ** 2).sum(0)
            out.append(jnp.where(far, weights * scale, weights) @ v[0, :, key])
        return jnp.stack(out, 1)[None], looks

    hidden, looks = model(tokens, positions, attend, None)
    return -jax.nn.log_softmax(model.logits(hidden)[0])[np.arange(T), ids[1:]].sum(), looks.sum(0)


def test_worth_is_what_the_places_give(byte_model):  # noqa: F811
    V = byte_model.config.vocab_size
    looks, gains = np.zeros(V), np.zeros(V)
    run = jax.jit(jax.grad(lambda g, ids: losses_and_looks(byte_model, ids, g), has_aux=True))
    for ids in ROWS:
        np.add.at(looks, ids[:-1], np.asarray(run(jnp.ones(len(ids) - 1), ids)[1]))
        np.add.at(gains, ids[:-1], -np.asarray(run(jnp.full(len(ids) - 1, 0.5), ids)[0]))
    counts = np.bincount(np.concatenate([ids[:-1] for ids in ROWS]), minlength=V)
    for by, expected in (("attention", looks), ("loss", gains)):
        sums, found = worth(byte_model, ROWS, by, window_size=WINDOW)
        np.testing.assert_array_equal(found, counts)
        np.testing.assert_allclose(sums, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_kinds_receive_what_their_places_do(byte_model, byte_tokenizer):  # noqa: F811
    sinks, texts = 2, token_texts(byte_tokenizer)
    rows = [*ROWS, np.arange(8, 38, dtype=np.int32)]
    counts = np.bincount(np.concatenate(rows), minlength=len(texts))
    kinds = [KINDS[kind] for kind in kinds_of_ids(byte_tokenizer, counts)]
    known = {texts.index(x): kind for x, kind in (("7", "number"), (".", "separator"), ("A", "capitalised"))}
    assert all(
        kinds[i] == kind for i, kind in (known | {texts.index("%"): "other", texts.index("a"): KINDS[6]}).items()
    )
    each: list[dict[str, list[float]]] = []
    for ids in rows:
        _, looks = losses_and_looks(byte_model, ids, jnp.ones(len(ids) - 1))
        places = len(ids) - 1 - WINDOW
        each.append({})
        for at in range(places):
            kind = "sink" if at < sinks else kinds[ids[at]]
            each[-1].setdefault(kind, []).append(float(looks[at]) / (places - at))
    found = far_attention_by_kind(byte_model, byte_tokenizer, rows, window_size=WINDOW, num_sinks=sinks)
    total = sum(sum(x) for row in each for x in row.values())
    others = [x for row in each for kind, some in row.items() if kind != "sink" for x in some]
    assert {x.kind for x in found} == {kind for row in each for kind in row}
    for share in found:
        mine = [x for row in each for x in row.get(share.kind, [])]
        assert share.attention == pytest.approx(sum(mine) / total, rel=1e-4)
        assert share.relative == pytest.approx(np.mean(mine) / np.mean(others), rel=1e-4)
        assert share.tokens == pytest.approx(len(mine) / sum(len(x) for row in each for x in row.values()))
        assert share.error is not None
    same = [rows[0]] * 3  # rows that do not differ leave no doubt; of one row nothing is known
    (first, *_) = far_attention_by_kind(byte_model, byte_tokenizer, same, window_size=WINDOW, num_sinks=sinks)
    assert first.error == pytest.approx(0, abs=1e-9 * first.relative)
    assert far_attention_by_kind(byte_model, byte_tokenizer, same[:1], window_size=WINDOW)[0].error is None


PICTURES = [
    ("kinds", ["--window_size=8", "--length=32"], "kind  "),
    pytest.param("mask", ["--arm=separator a=2 n=4"], "separator, window 4, 2 sinks: ", marks=pytest.mark.soak),
    # A stream's programs; what is drawn of its counts is in pictures/test_figures.py.
    pytest.param("slots", ["--arms=separator a=2 s=4 w=8 c=24"], "at most 24 entries, ", marks=pytest.mark.soak),
]


@pytest.fixture
def loaded(byte_model, byte_tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sepjax.loading.load", lambda path, **_: (byte_model, byte_tokenizer))


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("job", "flags", "said"), PICTURES)
def test_pictures_are_drawn_by_their_commands(tmp_path, capsys, job, flags, said):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox, and the lazy dog. " * 3)
    out = tmp_path / f"{job}.svg"
    run_here(["picture", job, f"--model={tmp_path}", f"--text={text}", f"--output={out}", *flags])
    printed = capsys.readouterr().out
    assert said in printed
    assert printed.endswith(f"written to {out}\n")
    assert f"{tmp_path.name}, text.txt" in out.read_text() or f"{tmp_path.name} reads text.txt" in out.read_text()


def test_rows_longer_than_a_table_of_positions_are_refused(byte_model):  # noqa: F811
    learned = random_model(dataclasses.replace(byte_model.config, position_embedding="learned", max_positions=20))
    with pytest.raises(ConfigError, match="rows of 24 tokens pass the model's 20 learned positions; give --length=20"):
        worth(learned, ROWS, "attention", window_size=WINDOW)


def test_means_of_few_uses_are_drawn_to_their_equals():
    counts = np.array([0, 1, 1, 100, 100])
    value = per_use(np.array([0.0, 8.0, 0.0, 300.0, 100.0]), counts)
    assert value[0] == 8 / 2  # it never came: the mean of those that came once
    assert value[1] == (8 + 4 * 4) / 5
    assert value[3] == pytest.approx(3, rel=0.02)


def test_the_best_fill_the_room():
    counts = np.array([50, 30, 10, 10, 0])
    ids = best_ids(np.array([4.0, 5.0, 3.0, 2.0, 1.0]), counts, 0.4, np.ones(5, bool))
    assert ids.tolist() == [1, 2]  # the first is too frequent for what 1 left; the last would fit, but the room is full
    assert best_ids(np.arange(5.0), counts, 0.4, np.arange(5) > 2).tolist() == [3, 4]


@pytest.fixture(scope="module")
def table(byte_model, byte_tokenizer):  # noqa: F811
    texts = ["the cat and the dog; Zoe saw the cat. " * 8, "A quite other text about the mat. " * 4]
    settings = {"density": 0.2, "window_size": 8, "length": 64, "max_tokens": 128}
    return lambda by, **changes: measure_table(byte_model, byte_tokenizer, texts, by=by, **(settings | changes))


@pytest.mark.parametrize("by", ["rarity", "attention", "loss"])
def test_tables_have_the_density_asked_for(table, by):
    found = table(by)
    assert 0.1 < found.kept <= 0.2
    assert (found.measured > 0) == (by != "rarity")
    assert found.most[0][1] == max(count for _, count in found.most)
    if by == "rarity":
        assert {"Z", ";"} <= {text for text, _ in found.most}
        assert " " not in {text for text, _ in found.most}


def test_a_table_becomes_the_separators_of_a_model(table, tmp_path, monkeypatch):
    found = table("rarity")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    store(found, tmp_path, AttentionConfig(window_size=9))
    values = json.loads((tmp_path / "config.json").read_text())
    attention = from_json_section(AttentionConfig, values["sepllm"])
    assert (attention.separator_ids, attention.window_size, values["model_type"]) == (found.separator_ids, 9, "llama")
    (tmp_path / "kept.json").write_text(json.dumps(dataclasses.asdict(found)))
    config = tmp_path / "config.py"
    config.write_text("from sepjax.config import Config\n\ndef get_config():\n    return Config()\n")
    from absl import flags

    argv = ["train.py", f"--config={config}", f"--config.attention.separators={tmp_path / 'kept.json'}"]
    (parsed,) = parse(argv, flags.FlagValues(), with_config=True)
    assert (parsed.attention.separators, parsed.attention.separator_ids) == ("ids", found.separator_ids)
    for name in ("none.json", "config.json"):
        with pytest.raises(ConfigError, match=rf"attention.separators=.*{name}"):
            with_ids(AttentionConfig(separators=str(tmp_path / name)))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(TableError, match="not a Hugging Face folder"):
        store(found, tmp_path, AttentionConfig())


def test_tables_that_cannot_be_measured_are_named(table):
    for changes, message in (
        ({"density": 1.0}, "above 0 and below 1"),
        ({"density": 1e-9, "by": "rarity"}, "less than any id"),
        ({"length": 8}, "nothing farther than --window_size=8"),
        ({"window_size": 400, "length": 500}, "no text has more"),
        ({"by": "magic"}, "'magic' is not one of rarity"),
    ):
        with pytest.raises(TableError, match=message):
            table(**({"by": "loss"} | changes))
