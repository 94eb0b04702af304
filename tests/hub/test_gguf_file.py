"""GGUF files written here, from a model of ours in llama.cpp's layout, and read back."""

import dataclasses
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

import sepjax
from sepjax.config import AttentionConfig, MeshConfig, ModelConfig, RopeConfig
from sepjax.data.special_tokens import SpecialTokens, read_beside
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.chat_template import ChatTemplate
from sepjax.hub.convert import convert
from sepjax.hub.errors import HubError
from sepjax.hub.export import save_folder
from sepjax.hub.gguf_file import GGUFError, gguf_shape, load_gguf
from sepjax.model.rope import rope_frequencies
from sepjax.model.transformer import in_8_bits, merge, split
from sepjax.sharding import make_mesh
from tests.models import random_split

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
    path,
    config=CONFIG,
    *,
    leave_out=(),
    architecture="llama",
    pre="smollm",
    quantised=False,
    extra=(),
    factors=None,
    kinds=(3, 3, 3),
    bos=1,
    chat=False,
    eot=0,
    pieces=None,
    **keys,
):
    """Writes a random model with more metadata (a dot in a key is "__"); returns its parameters as ours."""
    graph, params = random_split(config, None, seed=5)
    params = jax.tree_util.tree_map_with_path(_scaled, params)
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
    tokens, scores, types = pieces or (TOKENS, None, [*kinds, *[1] * (len(TOKENS) - len(kinds))])
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores:
        writer.add_token_scores(scores)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(bos)
    for name, value in keys.items():
        adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        adds.get(type(value), writer.add_array)(name.replace("__", "."), value)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(chat)
    if chat or eot:
        writer.add_eot_token_id(eot)
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    for name, data in tensors(params, config, architecture):
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


def _scaled(path, x):
    """Matrices whose attention matters, and norms that are not all alike (of few bits: 1 may be added)."""
    if "norm" in str(path):
        return np.asarray(x + np.random.default_rng(x.size).integers(-64, 64, x.shape) / 256, np.float32)
    return np.asarray(8 * x if x.ndim > 2 else x)


NAMES = {  # of a layer's parameters in GGUF
    "attention/query/kernel": "attn_q.weight", "attention/key/kernel": "attn_k.weight",
    "attention/value/kernel": "attn_v.weight", "attention/out/kernel": "attn_output.weight",
    "attention/query/bias": "attn_q.bias", "attention/key/bias": "attn_k.bias", "attention/value/bias": "attn_v.bias",
    "attention/query_norm/scale": "attn_q_norm.weight", "attention/key_norm/scale": "attn_k_norm.weight",
    "attention_norm/scale": "attn_norm.weight", "attention_out_norm/scale": "post_attention_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight", "mlp_out_norm/scale": "post_ffw_norm.weight",
    "mlp/gate/kernel": "ffn_gate.weight", "mlp/up/kernel": "ffn_up.weight", "mlp/down/kernel": "ffn_down.weight",
}  # fmt: skip


def tensors(params, config, architecture="llama"):
    one = np.float32(architecture == "gemma3")
    yield "token_embd.weight", params["embedding"]["embedding"]
    yield "output_norm.weight", params["final_norm"]["scale"] + one
    if not config.tie_embeddings:
        yield "output.weight", params["head"]["embedding"]
    for path, stacked in jax.tree_util.tree_leaves_with_path(params["layers"]):
        name = "/".join(key.key for key in path)
        for i, x in enumerate(stacked):
            if architecture in ("llama", "granite") and name in ("attention/query/kernel", "attention/key/kernel"):
                x = interleave(x, config)
            elif name.endswith("kernel"):
                x = x.reshape(-1, x.shape[-1]).T if "out" in name else x.reshape(x.shape[0], -1).T
            elif name.endswith("bias"):
                x = x.reshape(-1)
            yield f"blk.{i}.{NAMES[name]}", x + one if "norm" in name else x


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_written_and_read_is_the_same(tmp_path, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    _, params = write(tmp_path / "m.gguf", config)
    model, _ = sepjax.load(tmp_path / "m.gguf")
    assert model.config == config
    assert model.attention == AttentionConfig(num_sinks=4, window_size=256, max_separators=64, cache_size=800)
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], params)


OTHERS = {  # architecture -> what it has, and the metadata that say so
    "qwen2": ({"qkv_bias": True}, {}),
    "qwen3": ({"qk_norm": "head", "head_dim": 16}, {"qwen3__attention__key_length": 16}),
    "olmo2": ({"qk_norm": "width", "norm_position": "post"}, {}),
    "granite": (
        {"embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.015625, "logit_divisor": 8.0},
        {
            "granite__embedding_scale": 12.0,
            "granite__residual_scale": 0.22,
            "granite__attention__scale": 0.015625,
            "granite__logit_scale": 8.0,
        },
    ),
    "gemma3": (
        {
            "norm_offset": True,
            "norm_position": "both",
            "qk_norm": "head",
            "activation": "gelu_tanh",
            "embedding_scale": 32**0.5,
            "final_softcap": 30.0,
            "sliding_window": 512,
            "full_layers": (1,),
            "sliding_rope": RopeConfig(),
        },
        {
            "gemma3__attention__sliding_window": 512,
            "gemma3__attention__sliding_window_pattern": 2,
            "gemma3__final_logit_softcapping": 30.0,
        },
    ),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_written_and_read_are_the_same(tmp_path, architecture):
    settings, keys = OTHERS[architecture]
    config = dataclasses.replace(CONFIG, **settings)
    _, params = write(tmp_path / "m.gguf", config, architecture=architecture, pre="qwen2", **keys)
    model, tokenizer = sepjax.load(tmp_path / "m.gguf")
    assert model.config == config
    assert tokenizer.vocab_size == len(TOKENS)
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], params)
    save_folder(model, tokenizer, tmp_path / "out")  # it is a family's
    jax.tree.map(np.testing.assert_array_equal, split(sepjax.load(tmp_path / "out")[0])[1], params)


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_splits_as_its_own_library_does(tmp_path, prefix):
    text = tmp_path / "text.txt"
    words = ["the theme", "then, there", "other  mother", "12 thin things", "in an inn", "anthem"]
    text.write_text("\n".join(words * 20))
    settings = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "add_dummy_prefix": prefix}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "p"), minloglevel=2, hard_vocab_limit=False, **settings
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "p.model"))
    ids = range(theirs.vocab_size())
    kinds = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in ids]
    pieces = [theirs.id_to_piece(i) for i in ids], [theirs.get_score(i) for i in ids], kinds
    write(
        tmp_path / "m.gguf",
        dataclasses.replace(CONFIG, vocab_size=len(ids)),
        pieces=pieces,
        tokenizer__ggml__add_space_prefix=prefix,
    )
    _, tokenizer = gguf_shape(tmp_path / "m.gguf", dtype="float32")
    for written in ("the other theme", " an inn,  then\n12 mothers", "é in \U0001f600", "a"):
        assert tokenizer.encode(written) == theirs.encode(written)
        assert tokenizer.decode(theirs.encode(written)) == written


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
    # <|im_start|> starts a turn, not a text: nothing is put in front, and documents are divided by <|endoftext|>.
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, False)
    assert (tokenizer.document_start, tokenizer.document_end) == (0, 0)
    assert tokenizer.encode("<|im_start|>a", bos=True) == [1, 3]
    # The file names <|im_end|> alone; <|endoftext|> ends an answer by its text, where it is a control token.
    assert tokenizer.end_ids == (0, 2)
    write(tmp_path / "m.gguf", kinds=(4, 3, 3))
    assert gguf_shape(tmp_path / "m.gguf", dtype="float32")[1].end_ids == (2,)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"pre": "chameleon"}, "'chameleon'"),
        ({"leave_out": ["blk.1.ffn_up.weight"]}, "lacks tensor 'blk.1.ffn_up.weight'"),
        ({"extra": ["blk.0.attn_q.bias"]}, "'blk.0.attn_q.bias'"),
        ({"llama__rope__scaling__type": "longrope"}, "llama.rope.scaling.type='longrope': supported are"),
        ({"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 2.0}, "factor=2.0: contradicts"),
        (
            {"llama__rope__scaling__factor": 2.0, "llama__rope__scale_linear": 4.0},
            "factor=2.0: contradicts llama.rope.scale",
        ),
        ({"llama__rope__scaling__factor": 0.5}, "rope.factor=0.5 must be 1 or more"),
        ({"llama__rope__scaling__attn_factor": -1.0}, "attn_factor=-1.0: expected a number above 0"),
        ({"llama__rope__scaling__yarn_ext_factor": 1.0}, "yarn_ext_factor=1.0: not a key that is known"),
        ({"llama__rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier=0.1.*: not supported; only 0 is"),
        ({"llama__attention__key_length": 10}, "llama.rope.dimension_count=8: must be the size of a head, 10"),
        ({"llama__attention__value_length": 4}, "llama.attention.value_length=4: must be"),
        ({"llama__attention__scale": 0.25}, "llama.attention.scale=0.25: not supported"),
        ({"llama__attention__causal": False}, "llama.attention.causal=False: not supported; only True is"),
        ({"llama__attention__sliding_window": 64}, "llama.attention.sliding_window=64: not supported"),
        (
            {"architecture": "granite", "granite__rope__scaling__finetuned": False},
            "granite.rope.scaling.finetuned=False: a Granite without rotation",
        ),
        ({"architecture": "qwen2", "qwen2__attention__scale": 0.3}, "qwen2.attention.scale=0.3.*: not supported"),
        ({"llama__expert_count": 8}, "llama.expert_count=8: not supported"),
        ({"llama__final_logit_softcapping": 30.0}, "llama.final_logit_softcapping=30.0: not supported"),
        ({"llama__something_new": "x"}, "llama.something_new='x': not a key that is known"),
        ({"general__type": "adapter"}, "general.type='adapter': not supported; only 'model'"),
        ({"adapter__lora__alpha": 1.0}, "adapter.lora.alpha=1.0: not supported"),
        ({"split__count": 3}, "split.count=3: not supported"),
        ({"tokenizer__ggml__add_eos_token": True}, "tokenizer.ggml.add_eos_token=True: not supported"),
        ({"tokenizer__ggml__normalizer": "x"}, "tokenizer.ggml.normalizer='x': not supported"),
        ({"kinds": (9,)}, "tokenizer.ggml.token_type must be 14 numbers"),
        ({"bos": 14}, "tokenizer.ggml.bos_token_id=14, but there are 14 tokens"),
        ({"config": dataclasses.replace(CONFIG, max_positions=0)}, "llama.context_length=0: expected a whole number"),
    ],
)
def test_other_files_are_refused(tmp_path, settings, message):
    write(tmp_path / "m.gguf", **settings)
    with pytest.raises(HubError, match=message):
        load_gguf(tmp_path / "m.gguf", dtype="float32")


def test_scalings_are_what_llama_cpp_makes_of_them(tmp_path):
    """Its rule: a factor without a type is linear, and attn_factor comes on top of the type's own temperature."""
    scaling = "llama__rope__scaling__"
    for keys, rope in (
        ({f"{scaling}factor": 4.0}, {"scaling": "linear", "factor": 4.0}),
        ({"llama__rope__scale_linear": 2.0}, {"scaling": "linear", "factor": 2.0}),
        ({f"{scaling}type": "linear", f"{scaling}factor": 0.0}, {}),
        ({f"{scaling}type": "none", f"{scaling}finetuned": True}, {}),
        ({f"{scaling}attn_factor": 1.5}, {"attention_factor": 1.5}),
        (
            {f"{scaling}type": "yarn", f"{scaling}factor": 4.0},
            {"scaling": "yarn", "factor": 4.0, "original_context": 128},
        ),
        (
            {
                f"{scaling}type": "yarn",
                f"{scaling}factor": 4.0,
                f"{scaling}attn_factor": 2.0,
                f"{scaling}original_context_length": 32,
            },
            {
                "scaling": "yarn",
                "factor": 4.0,
                "original_context": 32,
                "attention_factor": 2 * (0.1 * np.log(4.0) + 1),
            },
        ),
    ):
        write(tmp_path / "m.gguf", **keys)
        found = gguf_shape(tmp_path / "m.gguf", dtype="float32")[0].rope
        assert found == dataclasses.replace(CONFIG.rope, **rope)
        own = 0.1 * np.log(found.factor) + 1 if found.scaling == "yarn" else 1.0
        assert rope_frequencies(found, 8)[1] == pytest.approx(rope.get("attention_factor", own))
    factors = np.ones(4, np.float32)
    write(tmp_path / "m.gguf", factors=factors)
    assert gguf_shape(tmp_path / "m.gguf", dtype="float32")[0] == CONFIG
    write(tmp_path / "m.gguf", factors=factors, llama__rope__scale_linear=2.0)
    with pytest.raises(GGUFError, match="beside the scaling 'linear'"):
        gguf_shape(tmp_path / "m.gguf", dtype="float32")


def test_one_value_a_layer_must_be_the_same_in_all(tmp_path):
    for value, outcome in ([8, 8], None), ([8, 4], "value_length=a list of 2: layers of different shapes"):
        write(tmp_path / "m.gguf", llama__attention__value_length=value)
        if outcome is None:
            assert gguf_shape(tmp_path / "m.gguf", dtype="float32")[0] == CONFIG
        else:
            with pytest.raises(GGUFError, match=outcome):
                gguf_shape(tmp_path / "m.gguf", dtype="float32")


def test_tokens_that_the_makers_defined_are_found_and_written(tmp_path):
    write(tmp_path / "m.gguf", kinds=(3, 4, 2))
    _, tokenizer = gguf_shape(tmp_path / "m.gguf", dtype="float32")
    assert tokenizer.encode("a<|im_start|>b<|im_end|>") == [3, 1, 4, 2]
    assert tokenizer.decode([3, 1, 4, 2]) == "a<|im_start|>b"


def test_the_chat_template_survives_conversion(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}"
    named = {"tokenizer__ggml__padding_token_id": 0, "tokenizer__ggml__unknown_token_id": 0}
    write(tmp_path / "m.gguf", **named, **{"tokenizer__chat_template": template})
    convert(tmp_path / "m.gguf", tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out")
    messages = [{"role": "user", "content": "a"}]
    for path in (tmp_path / "m.gguf", tmp_path / "run", tmp_path / "out"):
        found = ChatTemplate.find(path)
        assert (found.source, found.render(messages)) == (template, "<|im_start|>a|")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    names = SpecialTokens.read(read_beside(tmp_path / "out")).names
    assert (names["bos_token"], names["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (names["pad_token"], names["unk_token"]) == ("<|endoftext|>", "<|endoftext|>")
    texts = [sepjax.load(tmp_path / name)[1].encode("abc<|im_end|>") for name in ("m.gguf", "run", "out")]
    assert texts[0] == texts[1] == texts[2]


def header(tensors=0, fields=0, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def field(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGUF", "4 bytes are to follow byte 4, but it has 4"),
        (header(), "has the architecture None"),
        (
            header(
                fields=2,
                rest=field(b"general.architecture", 8, struct.pack("<Q", 8) + b"qwen3moe")
                + field(b"qwen3moe.expert_count", 4, struct.pack("<I", 8)),
            ),
            "the architecture 'qwen3moe', a mixture of experts; supported are",
        ),
        (header(version=0x03000000), "version 0x3000000, whose bytes are in the other order"),
        (header(version=1), "version 0x1; versions 2 and 3"),
        (header(tensors=2**60), "1152921504606846976 tensors"),
        (header(fields=2**60), "1152921504606846976 fields"),
        (header(fields=2**64 - 1, rest=bytes(10**6)), "18446744073709551615 fields"),
        (header(fields=70_000, rest=bytes(10**6)), "'' is there twice"),
        (header(fields=1, rest=struct.pack("<Q", 2**60) + bytes(20)), "1152921504606846976 bytes are to follow"),
        (header(fields=1, rest=field(b"a", 9, struct.pack("<IQ", 8, 2**60))), "1152921504606846976 strings"),
        (header(fields=1, rest=field(b"a", 9, struct.pack("<IQ", 4, 2**60))), "1152921504606846976 numbers"),
        (header(fields=1, rest=field(b"a", 9, struct.pack("<IQ", 9, 1)) + bytes(40)), "arrays within arrays"),
        (header(fields=1, rest=field(b"a", 9, struct.pack("<IQ", 77, 1)) + bytes(40)), "unknown kind 77"),
        (header(fields=1, rest=field(b"a", 13, bytes(8))), "unknown kind 13"),
        (header(fields=1, rest=field(b"\xff", 0, bytes(8))), "not UTF-8"),
        (header(tensors=1, rest=struct.pack("<QIIQ", 0, 0, 0, 0) + bytes(40)), "would have 0 axes"),
        (header(tensors=1, rest=struct.pack("<QIIQ", 0, 2**31, 0, 0) + bytes(40)), "would have 2147483648 axes"),
        (header(tensors=1, rest=struct.pack("<QIQIQ", 0, 1, 64, 999, 0) + bytes(64)), "the unknown type 999"),
        (header(tensors=1, rest=struct.pack("<QIQIQ", 0, 1, 2**62, 0, 0) + bytes(64)), "lies at bytes 64 to"),
        (
            header(tensors=1, rest=struct.pack("<QIQIQ", 0, 1, 7, 8, 0) + bytes(64)),
            "rows of 7 numbers, no multiple of 32",
        ),
        (
            header(fields=1, rest=field(b"general.alignment", 4, struct.pack("<I", 0)) + bytes(40)),
            "general.alignment=0 must be a power of two",
        ),
    ],
)
def test_what_a_header_announces_is_not_believed(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(GGUFError, match=message):
        sepjax.load(tmp_path / "m.gguf")


def test_sizes_that_the_tensors_do_not_have_are_refused_before_anything_is_made(tmp_path):
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for name, message in (
        (b"llama.block_count", "2147483647 layers, but there are 21 tensors in all"),
        (b"llama.feed_forward_length", "mlp_dim = 2147483647"),
    ):
        at = whole.index(name) + len(name) + 4
        (tmp_path / "m.gguf").write_bytes(whole[:at] + struct.pack("<I", 2**31 - 1) + whole[at + 4 :])
        with pytest.raises(HubError, match=message):
            sepjax.load(tmp_path / "m.gguf")


def test_damaged_files_are_refused(tmp_path):
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.gguf").write_bytes(b"something else" * 100)
    for name in ("cut.gguf", "other.gguf"):
        with pytest.raises(GGUFError, match="not a complete GGUF file"):
            load_gguf(tmp_path / name, dtype="float32")


def test_special_tokens_and_the_chat_template_survive(tmp_path):
    """All that ends an answer, BOS in front where the file says so, the template with the file's own names."""
    write(tmp_path / "m.gguf", chat=True)
    _, read = load_gguf(tmp_path / "m.gguf", dtype="float32")
    read.save(tmp_path / "tokenizer")
    for tokenizer in (read, Tokenizer.load(tmp_path / "tokenizer")):
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (1, 2, (0, 2))
        assert tokenizer.encode("a", bos=True) == [1, 3]
    for found in (ChatTemplate.of(read), ChatTemplate.find(tmp_path), ChatTemplate.find(tmp_path / "m.gguf")):
        assert found.render([{"role": "user", "content": "a"}]) == "<|im_start|>a<|im_end|>"
    write(tmp_path / "m.gguf", eot=len(TOKENS))
    with pytest.raises(GGUFError, match=r"eot_token_id=.*, but there are"):
        load_gguf(tmp_path / "m.gguf", dtype="float32")


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_are_read_in_the_type_that_they_are_used_in(tmp_path, tied):
    """Never all of them in a wider one; those of 8 bits have the codes of a model that is loaded whole."""
    _, params = write(tmp_path / "m.gguf", dataclasses.replace(CONFIG, tie_embeddings=tied))
    model, _ = sepjax.load(tmp_path / "m.gguf", dtype="bfloat16")
    read = split(model)[1]
    assert {x.dtype for x in jax.tree.leaves(read) if x.ndim > 2} == {jnp.dtype(jnp.bfloat16)}
    assert read["layers"]["mlp_norm"]["scale"].dtype == read["final_norm"]["scale"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, read, jax.tree.map(lambda x, y: x.astype(y.dtype), params, read))
    rounded = in_8_bits(sepjax.load(tmp_path / "m.gguf")[0])
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    for where in (None, mesh):
        model, _ = sepjax.load(tmp_path / "m.gguf", weight_dtype="int8", mesh=where)
        assert model.config == rounded.config
        jax.tree.map(np.testing.assert_array_equal, split(model)[1], split(rounded)[1])
    assert split(model)[1]["layers"]["mlp"]["up"]["scales"].sharding.spec == jax.P(None, "tensor")
