"""Worth of tokens against sums written out, and tables from the text to the model's folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.command.flags import parse
from sepjax.config import AttentionConfig, ConfigError, ModelConfig, from_json_section
from sepjax.evaluation.arms import parse_arms
from sepjax.generation.cache.mixed import bounded_sizes
from sepjax.keeping.kinds import KINDS, far_attention_by_kind, kinds_of_ids
from sepjax.keeping.layers import as_arm, best_layers, split_memory
from sepjax.keeping.measure import best_ids, gains_of_layers, per_use, worth
from sepjax.keeping.table import TableError, measure_table, store
from sepjax.model.rope import rope_table, rotate
from sepjax.programs import run_here
from sepjax.programs.common import one_arm
from sepjax.separators import token_texts, with_ids
from tests.evaluation.conftest import byte_model, byte_tokenizer  # noqa: F401

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


def test_pictures_are_drawn_by_their_commands(tmp_path, byte_model, byte_tokenizer, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("sepjax.loading.load", lambda path, **_: (byte_model, byte_tokenizer))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox, and the lazy dog. " * 3)
    for job, flags, said in (
        ("kinds", ["--window_size=8", "--length=32"], "kind  "),
        ("slots", ["--arms=separator a=2 s=4 w=8 c=24"], "at most 24 entries, "),
        ("mask", ["--arm=separator a=2 n=4"], "separator, window 4, 2 sinks: "),
    ):
        out = tmp_path / f"{job}.svg"
        run_here(["picture", job, f"--model={tmp_path}", f"--text={text}", f"--output={out}", *flags])
        printed = capsys.readouterr().out
        assert said in printed
        assert printed.endswith(f"written to {out}\n")
        assert f"{tmp_path.name}, text.txt" in out.read_text() or f"{tmp_path.name} reads text.txt" in out.read_text()


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


def test_layers_gain_what_their_far_values_give(byte_model):  # noqa: F811
    """Against the same loss written out, a factor for each layer."""
    L, i = byte_model.config.num_layers, jnp.arange(24)
    far = (i[:, None] - i >= WINDOW) & (i >= 2)

    def loss(g, ids):
        tokens, turn = (
            jnp.asarray(ids[None, :-1]),
            rope_table(i[None], byte_model.config.rope, byte_model.config.head_dim),
        )

        def attend(q, k, v, g):
            q, k = rotate(q, turn)[0], rotate(k, turn)[0]
            k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v[0]))
            scores = jnp.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
            sees = np.tri(24, dtype=bool)
            dense, near = (
                jax.nn.softmax(jnp.where(x, scores, -jnp.inf)) @ v.swapaxes(0, 1) for x in (sees, sees & ~far)
            )
            return (g * dense + (1 - g) * near).swapaxes(0, 1)[None], None

        hidden, _ = byte_model(tokens, i[None], attend, g)
        return -jax.nn.log_softmax(byte_model.logits(hidden)[0])[i, ids[1:]].sum()

    run = jax.jit(jax.grad(loss))
    expected = -sum(np.asarray(run(jnp.full(L, 0.5), ids)) for ids in ROWS) / 48
    gains = gains_of_layers(byte_model, ROWS, window_size=WINDOW, num_sinks=2)
    np.testing.assert_allclose(gains, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_memory_is_split_as_asked_for():
    config = ModelConfig(num_layers=30)
    layers = best_layers(np.where(np.isin(np.arange(30), (15, 17, 18, 20, 21, 23, 24)), 2.0, 1.0), 7)
    split = split_memory(config, layers, 800, AttentionConfig(num_sinks=4))
    assert layers == (15, 17, 18, 20, 21, 23, 24)
    sizes = bounded_sizes(config, split)
    held = [sizes.parts[part].cache_size for part in sizes.part_of]
    assert 799 < np.mean(held) <= 800
    assert set(held) == {600, 1457}
    odd = AttentionConfig(num_sinks=1, watch_layers=(0, 1), keep_all_separators=True)
    assert parse_arms(as_arm(split), odd, 30, cached=True)[0].attention == split
    shipped = one_arm("@smollm2_800", AttentionConfig(), 30)  # measured before this was written: two slots differ
    assert (shipped.kept_layers, shipped.cache_size, shipped.max_separators) == (layers, 1457, split.max_separators)
    assert np.mean([{0: 1457}.get(part, 600) for part in bounded_sizes(config, shipped).part_of]) <= 800
    with pytest.raises(ConfigError, match="no room for 4 sinks"):
        split_memory(config, layers, 20, AttentionConfig(num_sinks=4))
    with pytest.raises(ConfigError, match=r"30 of the model's 30 layers.*choose 1 to 29"):
        split_memory(config, range(30), 800)
    for text, message in (
        ("@smollm2_80", "smollm2_800"),
        ("dense; dense", "another arm"),
        ("x: dense; dense", "2 arms"),
    ):
        with pytest.raises(ConfigError, match=message):
            one_arm(text, AttentionConfig(), 30)


def test_the_program_writes_settings_that_streams_take(tmp_path, byte_model, byte_tokenizer, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("sepjax.loading.load", lambda path: (byte_model, byte_tokenizer))
    text, out = tmp_path / "text.txt", tmp_path / "mine.arm"
    text.write_text("The quick brown fox, and the lazy dog. " * 12)
    run_here(["layers", f"--model={tmp_path}", f"--text={text}", "--slots=160", "--layers=1", f"--output={out}",
              "--length=200"])  # fmt: skip
    said = capsys.readouterr().out
    assert f"--arm=@{out}" in said
    attention = one_arm(f"@{out}", byte_model.attention, byte_model.config.num_layers)
    assert len(attention.kept_layers) == 1
    assert f"* layer {attention.kept_layers[0]:>2}" in said
    for flags, message in (
        (["--length=120"], "--length=120 has nothing beyond the 120 tokens"),
        (["--layers=9"], "9 of the model's"),
    ):
        with pytest.raises(SystemExit):
            run_here(["layers", f"--model={tmp_path}", f"--text={text}", "--slots=160", f"--output={out}", *flags])
        assert message in capsys.readouterr().err
