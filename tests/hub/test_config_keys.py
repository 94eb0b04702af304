"""Keys of a config.json: each is read as transformers reads it, or refused by name. No model is made here."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sepjax.hub.errors import HubError
from sepjax.hub.families import family_for, family_of, read_model_config
from sepjax.hub.fields import Fields
from sepjax.model.rope import rope_frequencies

spec = importlib.util.spec_from_file_location("tiny_checkpoints_3", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
ROPES = tiny.golden_ropes()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**tiny.ROPE3, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0}
SLIDES = ["sliding_attention", "full_attention"]
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def read(values):
    fields = Fields("config.json", values)
    return read_model_config(fields, family_of(fields), "float32")


@pytest.mark.parametrize("name", ROPES)
def test_rotary_embeddings_are_those_of_transformers(name):
    values, kinds = ROPES[name]
    config = read(values)
    sliding = config.sliding_rope if config.sliding_rope.base else config.rope
    for rope, (frequencies, factor) in zip((config.rope, sliding), kinds, strict=False):
        found, scale = rope_frequencies(rope, config.head_dim)
        np.testing.assert_allclose(found, frequencies, rtol=2e-6)  # a few roundings of float32
        assert scale == pytest.approx(float(factor), rel=1e-12)
    # Written and read again it is the same.
    family, keys = family_for(config)
    again = read({"model_type": family.model_types[0], **keys})
    assert again == config


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("llama", {"rope_scaling": {**YARN, "trunc": 1}}, "rope_scaling.trunc=1: not a key of the rope type 'yarn'"),
        ("llama", {"rope_scaling": {**LINEAR, "beta_fast": 3}}, "rope_scaling.beta_fast=3: not a key of the rope type"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
            "rope_parameters.factor=2.0: not a key",
        ),
        ("llama", {"rope_scaling": {**YARN, "truncate": None}}, "rope_scaling.truncate=None: expected a value"),
        ("llama", {"rope_scaling": {**YARN, "truncate": 0}}, "rope_scaling.truncate=0: expected true or false"),
        ("llama", {"rope_scaling": {**YARN, "mscale": 2.0}}, "rope_scaling.mscale=2.0: .*together only"),
        (
            "llama",
            {"rope_scaling": {**YARN, "attention_factor": 1.0, "mscale": 2.0, "mscale_all_dim": 1.0}},
            "rope_scaling.attention_factor=1.0: contradicts mscale, mscale_all_dim",
        ),
        ("llama", {"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor=0.5: expected 1 or more"),
        ("llama", {"rope_scaling": {**YARN, "factor": 0}}, "rope_scaling.factor=0: expected a number above 0"),
        ("llama", {"rope_scaling": {**YARN, "beta_slow": 40}}, "rope_scaling.beta_slow=40: must be below beta_fast=32"),
        ("falcon", {"rope_scaling": {**LINEAR, "factor": 0.25}}, "rope_scaling.factor=0.25: expected 1 or more"),
        (
            "llama",
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4}},
            "low_freq_factor=4: must be below high_freq_factor",
        ),
        ("llama", {"rope_scaling": {**LINEAR, "type": "yarn"}}, "rope_type='linear': contradicts type='yarn'"),
        ("llama", {"rope_scaling": {"type": ["yarn"]}}, r"type=\['yarn'\]: rope type"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "type='dynamic': rope type 'dynamic'; supported",
        ),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ("llama", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "contradicts rope_parameters="),
        (
            "gpt_neox",
            {"rope_scaling": LINEAR, "rope_parameters": tiny.PART},
            "rope_scaling=.*contradicts rope_parameters=",
        ),
        ("llama", {"rope_scaling": [YARN]}, "expected a JSON object"),
        (
            "llama",
            {"rope_theta": 500.0, "rope_parameters": {**YARN, "rope_theta": 1e4}},
            "rope_theta=500.0: contradicts",
        ),
        ("llama", {"rope_theta": None}, "rope_theta=None: expected a number"),
        ("llama", {"rope_theta": 1}, r"rope.base=1.0 must be above 1"),
        ("llama", {"rope_theta": 10**400}, r"rope_theta=1000+\.\.\.: expected a number"),
        ("llama", {"rotary_emb_base": 500.0}, "rotary_emb_base=500.0: this architecture does not read it"),
        ("gpt_neox", {"rope_theta": 500.0}, "rope_theta=500.0: this architecture does not read it, and takes 10000"),
        (
            "gpt_neox",
            {"rotary_emb_base": 500.0, "rope_scaling": {**LINEAR, "rope_theta": 7.0}},
            "rotary_emb_base=500.0",
        ),
        (
            "gpt_neox",
            {"rotary_pct": 0.5, "partial_rotary_factor": 0.25},
            "partial_rotary_factor=0.25: contradicts rotary_pct",
        ),
        ("gpt_neox", {"rotary_pct": 0.2}, "rope.fraction=0.2 of head_dim=8 rotates 1.6 dimensions"),
        *(
            (kind, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: this architecture does not read it")
            for kind in ("llama", "mistral", "falcon")
        ),
        ("llama", {"rope_parameters": tiny.PART}, "partial_rotary_factor=0.5: this architecture rotates whole heads"),
        (
            "llama",
            {"original_max_position_embeddings": 16, "rope_scaling": YARN},
            "original_max_position_embeddings=16: contradicts rope_scaling.original_max_position_embeddings=32",
        ),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config=.*: quantised checkpoints"),
        ("gpt_neox", {"compression_config": {"format": "x"}}, "compression_config="),
        ("falcon", {"per_layer_config": {"0": {}}}, "per_layer_config="),
        ("mistral", {"is_causal": False}, "is_causal=False: attention in both directions"),
        ("llama", {"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors'"),
        ("mistral", {"attention_bias": True}, "attention_bias=True: a Mistral has no biases"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0: expected a whole number"),
        ("mistral", {"sliding_window": 9, "use_sliding_window": False}, "use_sliding_window=False: contradicts"),
        ("ministral", {"sliding_window": None, "layer_types": SLIDES}, "layer_types=.*no sliding window in use"),
        ("ministral", {"layer_types": ["full_attention"]}, "layer_types=.*: 1 kinds for num_hidden_layers=2"),
        ("qwen2", {"layer_types": SLIDES}, "layer_types=.*no sliding window in use"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers='x': expected a whole"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types=.*other kinds than full_attention and slid"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\]: expected a list of 2"),
        ("smollm3", {"no_rope_layers": [0, 0]}, "one at least must know positions"),
        ("olmo2", {"layer_types": SLIDES}, "layer_types=.*other kinds than full_attention are"),
        ("olmo3", {"rope_theta": 1e4}, "rope_theta=10000.0: without rope_parameters.sliding_attention"),
        ("olmo3", {"rope_parameters": YARN}, "rope_parameters.rope_type='yarn': expected an object for each"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: a soft cap of attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8}}, "rope_scaling=.*call it rope_type"),
        (
            "gemma3_text",
            {"rope_scaling": LINEAR, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_scaling=.*contradicts rope_parameters.full_attention",
        ),
        (
            "gemma3_text",
            {"rope_local_base_freq": 7.0, "rope_parameters": {"sliding_attention": {"rope_theta": 8.0}}},
            "rope_local_base_freq=7.0: contradicts rope_parameters.sliding_attention.rope_theta=8.0",
        ),
        ("granite", {"logits_scaling": 0}, "logits_scaling=0: expected a number above 0"),
        ("phi3", {"rope_scaling": {**YARN}}, "rope_scaling=.*a Phi-3 has no rotation of the type 'yarn'"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "type='longrope': rope type"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True: layer norms of each head's own"),
        ("gemma2", {}, "model_type='gemma2': supported architectures are .*did you mean 'gemma3_text'"),
        ("qwen3_moe", {"num_experts": 8}, "model_type='qwen3_moe': a mixture of experts; supported architectures are "),
        ("llama", {"num_key_value_heads": 3}, "num_heads=4 is not a multiple of model.num_kv_heads=3"),
        ("llama", {"num_attention_heads": 5}, "hidden_size=32: not a multiple of num_attention_heads=5"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0: expected a whole number"),
        ("llama", {"head_dim": 7}, "rotates 7 dimensions"),
        ("llama", {"rms_norm_eps": 3.0}, "norm_epsilon=3.0 must be"),
        *(
            (kind, {"sliding_window": 64, "max_position_embeddings": 128}, f"sliding_window=64: .* {kind} has none")
            for kind in ("llama", "olmo2", "granite", "stablelm", "gpt_neox", "falcon")
        ),
        (
            "llama",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types=.*other kinds than full_attention",
        ),
        ("gpt_neox", {"head_dim": 16}, "head_dim=16: in this architecture it is hidden_size / num_attention_heads, 8"),
        ("falcon", {"alibi": True}, "alibi=True: ALiBi"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn=False: contradicts"),
        ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads=2: without multi_query"),
        ("falcon", {"n_embed": 64}, "n_embed=64: contradicts hidden_size=32"),
        ("falcon", {"hidden_size": 33}, "hidden_size=33: not a multiple of num_attention_heads=4"),
    ],
)
def test_what_would_be_another_model_is_refused_by_name(kind, keys, message):
    with pytest.raises(HubError, match=rf"config\.json': .*{message}"):
        read(tiny.shape_of(kind, keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads=8: contradicts n_head=4"),
        ({"hidden_size": 64}, "hidden_size=64: contradicts n_embd=32"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False: unscaled"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"sliding_window": 63}, "sliding_window=63: the architecture gpt2 has none"),
        ({"n_embd": 34}, "n_embd=34: not a multiple of n_head=4"),
    ],
)
def test_what_would_be_another_gpt2_is_refused_by_name(keys, message):
    with pytest.raises(HubError, match=message):
        read(GPT2 | keys)


def test_other_names_and_missing_keys_mean_what_they_mean_to_transformers():
    other = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    other |= {"max_position_embeddings": "n_positions"}
    values = {key: value for key, value in GPT2.items() if key not in other.values()}
    assert read(values | {name: GPT2[key] for name, key in other.items()}) == read(GPT2)
    falcon = tiny.shape_of("falcon", {})
    assert read({"n_embed": falcon.pop("hidden_size"), **falcon}) == read(tiny.shape_of("falcon", {}))
    shape = tiny.shape_of("mistral", {"num_attention_heads": 16})
    missing = read({key: value for key, value in shape.items() if key != "num_key_value_heads"})
    assert (missing.num_kv_heads, missing.sliding_window, missing.max_positions) == (8, 4096, 131_072)
    null = read(shape | {"num_key_value_heads": None, "sliding_window": None})
    assert (null.num_kv_heads, null.sliding_window) == (16, 0)


def test_a_gemma_without_a_window_is_written_as_transformers_can_run_it():
    full = tiny.shape_of("gemma3_text", {"layer_types": ["full_attention"] * 2, "sliding_window": 8})
    config = read(full | {"max_position_embeddings": 64})
    family, keys = family_for(config)
    assert (config.sliding_window, keys["sliding_window"], keys["layer_types"]) == (0, 64, ["full_attention"] * 2)
    assert read({"model_type": family.model_types[0], **keys}) == config


def test_rotations_of_both_kinds_are_written_for_older_versions_of_transformers_too():
    """They do not know rope_parameters; what they cannot say is left to newer ones."""

    def older(kind, full, sliding):
        sections = {"full_attention": full, "sliding_attention": sliding}
        config = read(tiny.shape_of(kind, {"layer_types": SLIDES, "sliding_window": 8, "rope_parameters": sections}))
        family, keys = family_for(config)
        assert read({"model_type": family.model_types[0], **keys}) == config
        scaling = keys.get("rope_scaling")
        assert scaling in (None, keys["rope_parameters"]["full_attention"])
        return keys.get("rope_theta"), keys.get("rope_local_base_freq"), scaling and scaling["rope_type"]

    plain, far = {"rope_theta": 5e5}, {**LINEAR, "rope_theta": 5e5}
    assert older("gemma3_text", far, {"rope_theta": 2e4}) == (5e5, 2e4, "linear")
    assert older("gemma3_text", plain, plain) == (5e5, 5e5, None)
    assert older("gemma3_text", plain, far) == (None, None, None)
    assert older("olmo3", {**YARN, "rope_theta": 5e5}, plain) == (5e5, None, "yarn")
    assert older("olmo3", far, {"rope_theta": 1e4}) == older("olmo3", plain, far) == (None, None, None)
