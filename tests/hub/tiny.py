"""Tiny checkpoints of every family, from names and shapes that transformers gave (golden.json). Needs NumPy alone."""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LENGTH, NEW_TOKENS = 24, 8
SINKS, WINDOW = 2, 5
COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
NEOX = {**COMMON, "intermediate_size": 64, "max_position_embeddings": 128}
FALCON = {**COMMON, "max_position_embeddings": 128}
ROPE3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PART = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GROUPS = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}

LINEAR2 = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
ALTERNATE = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

# name -> (model_type, settings); what is not set is transformers' default
VARIANTS = {
    "llama": ("llama", {**LLAMA, "rms_norm_eps": 1e-5}),
    "llama-3.1": (
        "llama",
        {
            **LLAMA,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {**ROPE3, "rope_theta": 500.0, "original_max_position_embeddings": 16},
        },
    ),
    "llama-bias": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-yarn": ("llama", {**LLAMA, "rope_parameters": YARN}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 8}),
    "ministral": ("ministral", {**LLAMA, **ALTERNATE, "head_dim": 16}),
    "qwen2": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**LLAMA, "vocab_size": 72, "head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": (
        "smollm3",
        {
            **LLAMA,
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": 8,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "olmo2": ("olmo2", LLAMA),
    "olmo3": (
        "olmo3",
        {**LLAMA, **ALTERNATE, "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 500.0}}},
    ),
    "gemma3": (
        "gemma3_text",
        {
            **LLAMA,
            **ALTERNATE,
            "head_dim": 16,
            "num_attention_heads": 4,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 20.0,
            "rope_parameters": {"full_attention": LINEAR2, "sliding_attention": {"rope_theta": 500.0}},
        },
    ),
    "granite": (
        "granite",
        {
            **LLAMA,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.5,
            "logits_scaling": 0.7,
        },
    ),
    "phi3": (
        "phi3",
        {
            **LLAMA,
            "sliding_window": 8,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "stablelm": ("stablelm", {**LLAMA, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {**LLAMA, "use_parallel_residual": True}),
    "pythia": ("gpt_neox", {**NEOX, "rope_parameters": PART}),
    "gpt_neox-serial": ("gpt_neox", {**NEOX, "use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "falcon-7b": ("falcon", FALCON),
    "falcon-40b": ("falcon", {**GROUPS, "tie_word_embeddings": False}),
    "falcon-serial": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
}  # fmt: skip

# Rotary embeddings as config.json may say them: name -> (model_type, keys besides the shape). golden.npz has the
# frequencies and the factor on cosine and sine that transformers makes of each.
Y = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
L3 = {**ROPE3, "original_max_position_embeddings": 64}
LINEAR8 = {"rope_type": "linear", "factor": 8}
WIDE = {"head_dim": 64, "max_position_embeddings": 128}
ROPES = {
    "outside": ("llama", {**WIDE, "rope_theta": 5e5}),
    "null sections": ("llama", {**WIDE, "rope_scaling": None, "rope_parameters": None}),
    "said twice alike": ("llama", {**WIDE, "rope_theta": 500.0, "rope_scaling": Y, "rope_parameters": Y}),
    "base within rope_scaling": ("llama", {**WIDE, "rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 1e5}}),
    "llama3": ("llama", {**WIDE, "rope_theta": 5e5, "rope_scaling": L3}),
    "llama3, narrow": ("falcon", {"rope_parameters": {**L3, "low_freq_factor": 2, "high_freq_factor": 2.5}}),
    "yarn": ("llama", {**WIDE, "rope_parameters": Y}),
    "yarn, not truncated": ("llama", {**WIDE, "rope_parameters": {**Y, "truncate": False}}),
    "yarn, truncated": ("llama", {**WIDE, "rope_theta": 300, "rope_scaling": {**Y, "truncate": True, "finetuned": 1}}),
    "yarn, its own temperature": ("llama", {**WIDE, "rope_scaling": {**Y, "attention_factor": 0.7}}),
    "yarn, mscale": ("mistral", {**WIDE, "rope_scaling": {**Y, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    "yarn, betas": ("llama", {**WIDE, "rope_scaling": {**Y, "beta_fast": 8, "beta_slow": 0.5, "mscale": 0}}),
    "yarn, nulls": ("llama", {**WIDE, "rope_scaling": {**Y, "beta_fast": None, "attention_factor": None}}),
    "yarn of a factor 1": ("llama", {**WIDE, "rope_scaling": {**Y, "factor": 1}}),
    "yarn, ramp beyond the head": ("llama", {**WIDE, "rope_theta": 3.0, "rope_scaling": {**Y, "factor": 8}}),
    "yarn of a Llama's positions": ("llama", {"head_dim": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "yarn of a Mistral's positions": ("mistral", {"head_dim": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "yarn of a context outside": (
        "llama",
        {**WIDE, "original_max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    ),
    "neox": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5000}),
    "neox, default share": ("gpt_neox", {"hidden_size": 64, "rotary_emb_base": 5000, "rope_theta": 5000}),
    "neox, base in a section": (
        "gpt_neox",
        {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 700.0}},
    ),
    "neox, yarn of half a head": (
        "gpt_neox",
        {"hidden_size": 256, "rope_scaling": {**Y, "truncate": False, "partial_rotary_factor": 0.5}},
    ),
    "qwen3": ("qwen3", {"head_dim": 64, "rope_theta": 1e6, "rope_scaling": {**Y, "type": "yarn"}}),
    "smollm3, default base": ("smollm3", {"head_dim": 64}),
    "phi3, a share outside": ("phi3", {"hidden_size": 256, "partial_rotary_factor": 0.75}),
    "stablelm, default share": ("stablelm", {"hidden_size": 256}),
    "gemma, older keys": (
        "gemma3_text",
        {"head_dim": 64, "rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR8},
    ),
    "gemma, defaults": ("gemma3_text", {"head_dim": 64}),
    "gemma, a kind each": (
        "gemma3_text",
        {"head_dim": 64, "rope_parameters": {"full_attention": {**Y, "rope_theta": 7e2}, "sliding_attention": LINEAR2}},
    ),
    "olmo3, older keys": ("olmo3", {"head_dim": 64, "rope_theta": 500000, "rope_scaling": Y}),
    "olmo3, one kind alone": ("olmo3", {"head_dim": 64, "rope_parameters": {"full_attention": L3 | {"rope_theta": 3}}}),
    "falcon, linear": ("falcon", {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 3}}),
}  # fmt: skip


WITH_KINDS = ("gemma3_text", "olmo3")  # of layers, each with a rotation of its own


def shape_of(kind, keys):
    """A whole config.json for `ROPES`."""
    shape = {"gpt_neox": NEOX, "falcon": FALCON}.get(kind, LLAMA | ALTERNATE if kind in WITH_KINDS else LLAMA)
    shape = {name: value for name, value in shape.items() if name != "max_position_embeddings"}
    return {"model_type": kind, **shape, **keys}


def tokens():
    return np.random.default_rng(1).integers(3, 64, (1, LENGTH))


def visible(window=None):
    """[1, T, T]: a mask of separators (ids below 11), sinks and a window, written out in full.

    window: of a model's own, beyond which none of them is seen.
    """
    ids = tokens()
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    return (j <= i) & ((ids[:, None, :] < 11) | (j < SINKS) | (i - j < WINDOW)) & (i - j < (window or LENGTH))


def weight(name, shape):
    """Numbers that depend on the name alone."""
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)
    is_norm = len(shape) == 1 and name.endswith("weight")
    return np.float32(1) + np.float32(0.2) * x if is_norm else np.float32(0.3) * x


def golden():
    manifest = json.loads((HERE / "golden.json").read_text())
    with np.load(HERE / "golden.npz", allow_pickle=False) as arrays:
        return {
            name: manifest[name] | {k: arrays[f"{name}/{k}"] for k in ("logits", "masked", "greedy")}
            for name in manifest
        }


def golden_ropes():
    """name -> (config.json, [(frequencies, factor)], of layers that slide a second one)."""
    with np.load(HERE / "golden.npz", allow_pickle=False) as arrays:
        return {
            name: (
                shape_of(*ROPES[name]),
                [
                    tuple(arrays[f"rope/{name}/{k}{kind}"] for k in "wm")
                    for kind in ("", "-sliding")
                    if f"rope/{name}/w{kind}" in arrays
                ],
            )
            for name in ROPES
        }


def write_safetensors(path, tensors):
    """A writer apart from the product's. Arrays of ml_dtypes' bfloat16 and NumPy's floats."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL", "uint8": "U8"}
    header, at = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype.name], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values()))


def write_checkpoint(folder, config, shapes, *, dtype=np.float32, files=1):
    """A folder as save_pretrained writes it, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: weight(name, tuple(shape)).astype(dtype) for name, shape in shapes.items()}
    if files == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return tensors
    places = {name: f"model-{1 + i % files:05}-of-{files:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        write_safetensors(folder / file, {name: tensors[name] for name in tensors if places[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors
