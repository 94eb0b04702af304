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
    "mistral": ("mistral", {**LLAMA, "sliding_window": None}),
    "pythia": ("gpt_neox", {**NEOX, "rope_parameters": PART}),
    "gpt_neox-serial": ("gpt_neox", {**NEOX, "use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "falcon-7b": ("falcon", FALCON),
    "falcon-40b": ("falcon", {**GROUPS, "tie_word_embeddings": False}),
    "falcon-serial": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
}  # fmt: skip


def tokens():
    return np.random.default_rng(1).integers(3, 64, (1, LENGTH))


def visible():
    """[1, T, T]: a mask of separators (ids below 11), sinks and a window, written out in full."""
    ids = tokens()
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    return (j <= i) & ((ids[:, None, :] < 11) | (j < SINKS) | (i - j < WINDOW))


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
