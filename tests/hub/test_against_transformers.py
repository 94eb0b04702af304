"""Random config.json files and GGUF metadata against transformers: equal logits, or refused by name.

SEPJAX_TORCH_PYTHON=... SEPJAX_FUZZ_SECONDS=600 python -m pytest -m soak -s tests/hub/test_against_transformers.py
"""

import collections
import copy
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sepjax
from sepjax.config import AttentionConfig, UserError
from sepjax.model.attend import forward

spec = importlib.util.spec_from_file_location("tiny_checkpoints_4", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

TORCH = sys.executable if importlib.util.find_spec("torch") else os.environ.get("SEPJAX_TORCH_PYTHON")
GOLDEN = tiny.golden()
DENSE = AttentionConfig(pattern="dense")
SOURCE = {"llama": "lm_head.weight", "mistral": "lm_head.weight", "gpt_neox": "embed_out.weight"}
EMBEDDING = ("model.embed_tokens.weight", "gpt_neox.embed_in.weight", "transformer.wte.weight")
EMBEDDING += ("transformer.word_embeddings.weight",)
ODD = [None, True, False, 0, 1, -1, 0.5, "x", [], {}, [1], 2**31 - 1, 2**70, 1e308, "silu", "1"]
KEYS = {  # what a key may become, besides ODD; those of one family are given to all
    "rope_theta": [1e4, 10000, 500.0, 2, 1e6],
    "rotary_emb_base": [1e4, 10000, 500.0],
    "rotary_pct": [0.25, 0.5, 1.0, 0.3],
    "partial_rotary_factor": [0.25, 0.5, 1.0, 1],
    "max_position_embeddings": [16, 64, 4096],
    "original_max_position_embeddings": [16, 32, 4096],
    "tie_word_embeddings": [True, False],
    "sliding_window": [1, 2, 8, 23, 24, 64, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 2],
    "sliding_window_pattern": [1, 2, 3],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2, ["sliding_attention", "full_attention"]],
    "no_rope_layers": [[0, 1], [1, 1], [1, 0], [0, 0], [1]],
    "no_rope_layer_interval": [1, 2, 3],
    "query_pre_attn_scalar": [16, 24, 100],
    "final_logit_softcapping": [None, 5.0, 30],
    "attn_logit_softcapping": [None, 5.0],
    "use_bidirectional_attention": [False, True],
    "rope_local_base_freq": [1e4, 500.0, 1e6],
    "embedding_multiplier": [1.0, 2, 12.0],
    "residual_multiplier": [1.0, 0.22],
    "logits_scaling": [1.0, 0.5, 8],
    "use_qkv_bias": [True, False],
    "qk_layernorm": [False, True],
    "pad_token_id": [0, None],
    "hidden_activation": ["silu", "gelu_pytorch_tanh", "gelu"],
    "hidden_act": ["silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "quick_gelu"],
    "activation": ["gelu", "gelu_new", "relu", "silu"],
    "activation_function": ["gelu", "gelu_new", "gelu_fast", "relu", "silu"],
    "rms_norm_eps": [1e-5, 1e-2, 0.3],
    "layer_norm_eps": [1e-5, 1e-2],
    "layer_norm_epsilon": [1e-5, 1e-2],
    "num_attention_heads": [2, 4, 8, 3],
    "n_head": [2, 4, 8],
    "num_key_value_heads": [1, 2, 4],
    "num_kv_heads": [1, 2, 4],
    "head_dim": [4, 8, 16],
    "hidden_size": [32, 64],
    "n_embd": [32, 64],
    "n_embed": [32, 64],
    "num_hidden_layers": [1, 2, 3],
    "intermediate_size": [48, 64],
    "ffn_hidden_size": [128, 64],
    "n_inner": [128, 64],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "bias": [True, False],
    "multi_query": [True, False],
    "parallel_attn": [True, False],
    "new_decoder_architecture": [True, False],
    "num_ln_in_parallel_attn": [1, 2, 3],
    "use_parallel_residual": [True, False],
    "alibi": [True, False],
    "scale_attn_weights": [True, False],
    "scale_attn_by_inverse_layer_idx": [True, False],
    "reorder_and_upcast_attn": [True, False],
    "add_cross_attention": [False],
    "is_causal": [True, False],
    "is_decoder": [True, False],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    "model_type": ["llama", "mistral"],
    "dtype": ["bfloat16", "float32"],
    "pretraining_tp": [1, 2],
    "use_cache": [False],
    "logit_scale": [2.0],
    "attention_multiplier": [0.5],
    "pruned_heads": [{"0": [0]}],
    "vocab_size": [64, 63],
}
SECTION = {
    "type": ["default", "linear", "llama3", "yarn", "dynamic", "longrope"],
    "rope_type": ["default", "linear", "llama3", "yarn", "dynamic", "proportional"],
    "factor": [1, 2.0, 4, 0.5, 8.0],
    "rope_theta": [1e4, 500.0, 3, 1e6],
    "partial_rotary_factor": [0.5, 1.0, 0.25],
    "original_max_position_embeddings": [4, 16, 32, 4096, 10**6],
    "low_freq_factor": [1, 1.0, 3],
    "high_freq_factor": [4.0, 2],
    "beta_fast": [32, 8.0, 1],
    "beta_slow": [1, 0.5, 4],
    "attention_factor": [1.0, 0.7, 1.5],
    "mscale": [1.0, 0.7, 0],
    "mscale_all_dim": [1.0, 1.3, 0],
    "truncate": [True, False],
    "short_factor": [[1.0] * 4],
    "mrope_section": [[1, 1, 2]],
}
KINDS = "full_attention", "sliding_attention"
NEEDS = {  # so that half of the sections are whole
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def draw(rng, values):
    return copy.deepcopy(rng.choice(values if rng.random() < 0.9 else ODD))


def section(rng):
    kind = rng.choice([*NEEDS])
    keys = {rng.choice(["type", "rope_type"]): kind}
    keys |= {name: draw(rng, SECTION[name]) for name in NEEDS[kind]} if rng.random() < 0.8 else {}
    more = rng.sample([*SECTION], rng.choice([0, 0, 1, 1, 2, 3]))
    return keys | {name: draw(rng, SECTION[name]) for name in more}


def hub_config(rng):
    """A config.json and the tensors beside it."""
    variant = GOLDEN[rng.choice([*GOLDEN])]
    config, kind = copy.deepcopy(variant["config"]), variant["config"]["model_type"]
    tensors = {name: tiny.weight(name, tuple(shape)) for name, shape in variant["shapes"].items()}
    known = [name for name in KEYS if name in config] * 8 + [*KEYS]
    for name in rng.sample(known, rng.choice([0, 1, 1, 2, 3])):
        if rng.random() < 0.1:
            config.pop(name, None)
        else:
            config[name] = draw(rng, KEYS[name])
    for name in ("rope_parameters", "rope_scaling"):
        if kind != "gpt2" and rng.random() < 0.35:
            kinds = [kind for kind in KINDS if rng.random() < 0.8]
            nested = config.get("model_type") in tiny.WITH_KINDS and name == "rope_parameters" and rng.random() < 0.9
            found = {kind: section(rng) for kind in kinds} if nested else section(rng)
            config[name] = found if rng.random() < 0.95 else draw(rng, ODD)
            if name == "rope_scaling" and rng.random() < 0.8:
                config.pop("rope_parameters", None)  # else they contradict each other
    if rng.random() < 0.1 and isinstance(config.get("rope_scaling"), dict):
        config["rope_parameters"] = copy.deepcopy(config["rope_scaling"])
    if rng.random() < 0.25:
        head, embedding = SOURCE.get(kind, "lm_head.weight"), next(x for x in tensors if x in EMBEDDING)
        own = tiny.weight("a head of its own", tensors[embedding].shape)
        tensors[head] = rng.choice([own, tensors[embedding]])
        config["tie_word_embeddings"] = rng.choice([True, True, False])
    return config, tensors


GGUF_KEYS = {  # without effect on a Llama, or with one that must be refused
    "llama.attention.scale": [0.0, 0.3],
    "llama.attention.causal": [True, False],
    "llama.attention.sliding_window": [0, 4],
    "llama.attention.value_length": [8, 4],
    "llama.attention.key_length": [8, 16],
    "llama.attention.clamp_kqv": [0.0, 1.0],
    "llama.expert_count": [0, 4],
    "llama.logit_scale": [0.0, 2.0],
    "llama.embedding_scale": [2.0],
    "llama.residual_scale": [0.5],
    "llama.final_logit_softcapping": [0.0, 3.0],
    "llama.rope.scaling.yarn_log_multiplier": [0.0, 0.5],
    "llama.rope.scaling.yarn_beta_fast": [32.0, 4.0],
    "llama.rope.scaling.finetuned": [True, False],
    "llama.rope.dimension_count": [8, 4],
    "llama.rope.dimension_sections": [[1, 1, 2]],
    "llama.tensor_data_layout": ["Meta AI original pth"],
    "llama.vocab_size": [64, 65],
    "llama.unheard_of": [1, "x"],
    "general.file_type": [0, 7],
    "general.type": ["model", "adapter"],
    "general.alignment": [32, 64, 7, 0],
    "split.count": [1, 3],
    "adapter.type": ["lora"],
    "mistral.attention.scale": [0.3],
    "tokenizer.ggml.add_space_prefix": [True, False],
    "tokenizer.ggml.add_eos_token": [True, False],
}


GGUF_OTHERS = {  # architecture -> name in golden.json, keys of config.json, metadata that say the same
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, {"attention.key_length": 16}),
    "olmo2": ("olmo2", {}, {}),
    "granite": (
        "granite",
        {key: GOLDEN["granite"]["config"][key] for key in ("embedding_multiplier", "residual_multiplier")}
        | {"attention_multiplier": 0.5, "logits_scaling": 0.7},
        {"embedding_scale": 3.0, "residual_scale": 0.4, "attention.scale": 0.5, "logit_scale": 0.7},
    ),
    "gemma3": (
        "gemma3",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "final_logit_softcapping": 20.0}
        | {"layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
        {"attention.key_length": 16, "attention.sliding_window": 8, "attention.sliding_window_pattern": 2}
        | {"final_logit_softcapping": 20.0},
    ),
}


def gguf_metadata(rng):
    """The architecture, a config.json and the metadata that mean the same, with more that must not matter."""
    name = rng.choice(["llama", "llama", *GGUF_OTHERS])
    theta, factor = rng.choice([1e4, 500.0, 1e6]), rng.choice([1.0, 2.0, 4.0])
    keys = {
        "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": theta,
    }  # fmt: skip
    kind = rng.choice([None, None, "none", "linear", "yarn"])
    scaling = {"rope_type": "linear", "factor": factor}
    if kind is not None:
        keys["rope.scaling.type"] = kind
    if kind == "yarn":
        context = rng.choice([16, 32, 128])
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
        if context != 128:
            keys["rope.scaling.original_context_length"] = context
        if rng.random() < 0.3:
            own = keys["rope.scaling.attn_factor"] = rng.choice([1.0, 0.5, 1.5])
            scaling["attention_factor"] = own * (0.1 * float(np.log(factor)) + 1)
    if kind == "none":
        scaling = None
    else:
        keys[rng.choice(["rope.scaling.factor", "rope.scale_linear"])] = factor
    golden, settings, more = GGUF_OTHERS.get(name, ("llama", {}, {}))
    keys |= more
    config = {**tiny.LLAMA, "model_type": GOLDEN[golden]["config"]["model_type"], "rms_norm_eps": 1e-5, **settings}
    keys = {f"{name}.{key}": value for key, value in keys.items()}
    for other in rng.sample([*GGUF_KEYS], rng.choice([0, 0, 1, 2])):
        if name == "llama" or not other.startswith("llama."):
            keys[other] = rng.choice(GGUF_KEYS[other])
    return name, golden, config | {"rope_theta": theta, "rope_scaling": scaling}, keys


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "post_attention_layernorm": "ffn_norm", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
GGUF_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
GGUF_NORMS |= {"pre_feedforward_layernorm": "ffn_norm"}


def write_gguf(path, architecture, keys, tensors):
    writer = gguf.GGUFWriter(path, architecture)
    writer.data_alignment = alignment if (alignment := keys.get("general.alignment")) in (32, 64) else 32
    for name, value in keys.items():
        adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        adds.get(type(value), writer.add_array)(name, value)
    rows = len(tensors["model.embed_tokens.weight"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*map(chr, range(0x4E00, 0x4DFF + rows)), "\u4e00\u4e01"])
    writer.add_token_types([1] * rows)
    writer.add_token_merges(["\u4e00 \u4e01"])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    of_layer = GGUF_NAMES | (GGUF_NORMS if architecture in ("olmo2", "gemma3") else {})
    for i, (theirs, ours) in itertools.product(range(2), of_layer.items()):
        names[f"model.layers.{i}.{theirs}"] = f"blk.{i}.{ours}"
    for name, x in tensors.items():
        if architecture in ("llama", "granite") and ("q_proj" in name or "k_proj" in name):  # pairs side by side
            x = x.reshape(-1, 2, 4, 32).swapaxes(1, 2).reshape(-1, 32)
        if architecture == "gemma3" and "norm" in name:
            x = x + np.float32(1)
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names[stem]}.{kind}", np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Reference:
    """transformers in a process of its own."""

    def __init__(self):
        script = Path(__file__).with_name("torch_reference.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen([str(TORCH), str(script), "serve"], **pipes)

    def logits(self, folder):
        """Its logits, or why there are none."""
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return np.load(folder / "logits.npy") if line == "answer ok\n" else line[7:].strip()
        raise RuntimeError("the process of transformers ended")


def ours(path):
    """Our logits, or the message. Without jit: primitives of these few shapes are compiled once for all examples."""
    try:
        model, _ = sepjax.load(path)
    except (UserError, OSError) as error:
        return str(error)
    tokens = jnp.asarray(tiny.tokens(), jnp.int32)
    with jax.disable_jit():
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return np.asarray(model.logits(forward(model, tokens, positions, tokens < 11, None, DENSE)[0]))


def example(rng, folder, tokenizer_text):
    """Writes one; returns what to load, and what it is in words."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if rng.random() < 0.25:
        architecture, golden, config, keys = gguf_metadata(rng)
        tensors = {name: tiny.weight(name, tuple(shape)) for name, shape in GOLDEN[golden]["shapes"].items()}
        config["vocab_size"] = len(tensors["model.embed_tokens.weight"])
        config["pad_token_id"] = 0
        write_gguf(folder / "m.gguf", architecture, keys, tensors)
        path, about = folder / "m.gguf", json.dumps(keys)
    else:
        config, tensors = hub_config(rng)
        path, about = folder, json.dumps(config) + (" with a head" if "lm_head.weight" in tensors else "")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer_text)
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    return path, about


@pytest.mark.soak
@pytest.mark.skipif(TORCH is None, reason="needs torch and transformers here, or SEPJAX_TORCH_PYTHON")
def test_every_config_is_read_as_transformers_does_or_refused(tmp_path, tokenizer_text):
    reference, tally, refused, faults = Reference(), collections.Counter(), collections.Counter(), []
    end = time.monotonic() + float(os.environ.get("SEPJAX_FUZZ_SECONDS", "600"))
    first = int(os.environ.get("SEPJAX_FUZZ_SEED", "0"))
    for seed in itertools.count(first):
        path, about = example(random.Random(seed), tmp_path / "m", tokenizer_text)
        kind, found = path.suffix or "config.json", ours(path)
        if isinstance(found, str):
            assert str(tmp_path) in found, (seed, about, found)  # it names the file
            tally[f"{kind}: refused"] += 1
            refused[re.sub(r"'[^']*'|[\d.]+", "_", found.partition("': ")[2])[:70]] += 1
        else:
            expected = reference.logits(tmp_path / "m")
            if isinstance(expected, str):
                tally[f"{kind}: read, and refused by transformers ({expected[:90]})"] += 1
            elif not np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max():
                faults.append((seed, about, float(np.abs(found - expected).max())))
            else:
                tally[f"{kind}: equal"] += 1
        if time.monotonic() > end or len(faults) > 20:
            break
    reference.process.communicate()
    print(f"\nseeds {first} to {seed}")
    print("\n".join(f"{count:6} {name}" for name, count in sorted(tally.items())))
    print("\n".join(f"{count:6} refused: {reason}" for reason, count in refused.most_common(100)))
    print("\n".join(map(str, faults)))
    assert not faults
    for kind in ("config.json", ".gguf"):
        assert tally[f"{kind}: equal"]
        assert tally[f"{kind}: refused"]
