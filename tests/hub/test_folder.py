"""Hugging Face folders: forms of files and configs, types and shards, out again bit for bit, and all that is wrong."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import sepjax
from sepjax import kept
from sepjax.config import MeshConfig, ModelConfig, UserError
from sepjax.data.tokenizer import Tokenizer, train_sentencepiece
from sepjax.hub import assemble, export
from sepjax.hub.convert import convert
from sepjax.hub.errors import HubError
from sepjax.hub.export import save_folder
from sepjax.hub.families import ATTENTION, FAMILIES
from sepjax.hub.fields import Fields
from sepjax.hub.folder import folder_shape
from sepjax.hub.remote import fetch
from sepjax.hub.safetensors_file import Planned, SafetensorsFile, write_safetensors
from sepjax.loading import LoadError, load_shape
from sepjax.model.transformer import split
from sepjax.model.unrolled import working_copy
from sepjax.run.checkpoint import load_params
from sepjax.sharding import make_mesh, parameter_shardings
from tests.models import random_model

spec = importlib.util.spec_from_file_location("tiny_checkpoints_2", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
GOLDEN = tiny.golden()
INDEX = "model.safetensors.index.json"


@pytest.fixture
def make(tmp_path, tokenizer_text):
    def make(name="llama", folder="m", *, config=None, **settings):
        variant = GOLDEN[name]
        written = tiny.write_checkpoint(
            tmp_path / folder, variant["config"] | (config or {}), variant["shapes"], **settings
        )
        (tmp_path / folder / "tokenizer.json").write_text(tokenizer_text)
        return tmp_path / folder, written

    return make


def leaves(model):
    return jax.tree.leaves(split(model)[1])


def tensors(folder):
    files = [SafetensorsFile(path) for path in folder.glob("*.safetensors")]
    return {name: file.view(name) for file in files for name in file.entries}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, ml_dtypes.bfloat16) for name in GOLDEN), ("llama", np.float16), ("pythia", np.float32)]
)
def test_in_and_out_again_is_the_same_bit_for_bit(make, name, dtype, tmp_path):
    folder, written = make(name, dtype=dtype, files=2)
    model, tokenizer = sepjax.load(folder)
    assert {x.dtype for x in leaves(model)} == {np.dtype(dtype)}
    like = folder if name == "falcon-serial" else None  # a GPT-NeoX has that shape too, and comes first
    save_folder(model, tokenizer, tmp_path / "out", shard_bytes=9000, like=like)
    read = tensors(tmp_path / "out")
    assert read.keys() == written.keys()
    for key, x in written.items():
        assert (read[key].dtype, read[key].tobytes()) == (x.dtype, x.tobytes()), key
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in written.values())
    again, _ = sepjax.load(tmp_path / "out")
    assert (again.config, again.attention) == (model.config, model.attention)
    jax.tree.map(np.testing.assert_array_equal, leaves(again), leaves(model))


def test_to_orbax_and_back_is_the_same_bit_for_bit(make, tmp_path):
    extra = {"dtype": "bfloat16", "eos_token_id": 0, "a_key_of_theirs": [1]}
    folder, written = make("falcon-40b", dtype=ml_dtypes.bfloat16, config=extra)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / kept.NAME).write_text("sink_window n=9 c=20\n")
    convert(folder, tmp_path / "run")
    config, params, step = load_params(tmp_path / "run")
    assert (step, config.attention, {x.dtype for x in jax.tree.leaves(params)}) == (0, ATTENTION, {np.dtype("float32")})
    run, tokenizer = sepjax.load(tmp_path / "run")
    assert tokenizer.encode("the") == sepjax.load(folder)[1].encode("the")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), leaves(run), leaves(sepjax.load(folder)[0]))
    convert(tmp_path / "run", tmp_path / "out")
    read = tensors(tmp_path / "out")
    assert {key: x.tobytes() for key, x in read.items()} == {key: x.tobytes() for key, x in written.items()}
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys.pop("sepllm")["window_size"] == 256
    assert keys == json.loads((folder / "config.json").read_text())
    assert (run.attention, run.kept.pattern, run.kept.cache_size) == (ATTENTION, "sink_window", 20)
    for name in ("tokenizer.json", "chat_template.jinja", kept.NAME):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    for target in (tmp_path / "run", tmp_path / "out"):
        with pytest.raises(HubError, match="is there already"):
            convert(folder, target)


def test_our_settings_come_back(make, tmp_path):
    model, tokenizer = sepjax.load(make("pythia")[0])
    model.attention = dataclasses.replace(ATTENTION, window_size=7, layer_windows=(7, 9), separators="paper")
    save_folder(model, tokenizer, tmp_path / "out", dtype="bfloat16")
    again, _ = sepjax.load(tmp_path / "out", dtype="bfloat16", param_dtype="float32")
    assert again.attention == model.attention
    assert again.config.dtype == "bfloat16"
    assert {x.dtype for x in leaves(again)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_parameters_as_generation_uses_them_are_read_as_such(make, name):
    """No matrix of float32 lies on a device that computes in bfloat16: a GGUF file would take twice the room."""
    folder, _ = make(name, dtype=np.float32)
    found, own = (sepjax.load(folder, dtype="bfloat16", param_dtype=x)[0] for x in ("working", None))
    expected = jax.tree.leaves(working_copy(split(own)[1], own.config))
    for x, y in zip(leaves(found), expected, strict=True):
        assert (x.dtype, np.asarray(x).tobytes()) == (y.dtype, np.asarray(y).tobytes())
    assert {x.dtype.name for x in expected} == {"bfloat16", "float32"}
    smaller = sepjax.load(make(name, "small", dtype=ml_dtypes.bfloat16)[0], dtype="float32", param_dtype="working")[0]
    assert {x.dtype.name for x in leaves(smaller)} == {"bfloat16"}


def test_what_other_programs_look_for_is_written(tmp_path):
    """Of a model trained here: without these files transformers puts no BOS before a text, and ends no answer."""
    tokenizer = train_sentencepiece(["the ant ran in.\n"] * 9, 300)
    model = random_model(ModelConfig(tokenizer.vocab_size, 1, 16, 2, head_dim=8, mlp_dim=16))
    save_folder(model, tokenizer, tmp_path / "out")
    names = ("tokenizer_config.json", "generation_config.json", "config.json")
    said, generation, config = (json.loads((tmp_path / "out" / name).read_text()) for name in names)
    assert said == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    assert generation == {"bos_token_id": 1, "eos_token_id": 2} == {name: config[name] for name in generation}
    again = Tokenizer.load(tmp_path / "out")
    assert (again.prefix, again.end_ids) == (tokenizer.prefix, tokenizer.end_ids)
    for text in ("an ant", "<s> \n", " ran"):
        assert again.encode(text) == tokenizer.encode(text)


def test_each_device_reads_its_own_part(make, monkeypatch):
    folder, _ = make("falcon-40b", files=3)
    whole, _ = sepjax.load(folder)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    read = []
    original = assemble._reader

    def spy(*arguments):
        inner = original(*arguments)
        return lambda index: read.append((arguments[4], inner(index))) or read[-1][1]

    monkeypatch.setattr(assemble, "_reader", spy)
    model, _ = sepjax.load(folder, mesh=mesh)
    for x, y, sharding in zip(
        leaves(model), leaves(whole), jax.tree.leaves(parameter_shardings(split(model)[1], mesh)), strict=True
    ):
        assert x.sharding == sharding
        np.testing.assert_array_equal(x, y)
    matrices = [(shape, part.shape) for shape, part in read if len(shape) > 2]
    assert matrices
    assert all(8 * np.prod(part) == np.prod(shape) for shape, part in matrices)


class _Held(threading.Thread):
    """The most memory that this process holds, mapped files aside, while a block runs: bytes above those before it."""

    def __enter__(self):
        self.before = self.most = self.now()
        self.ended = threading.Event()
        self.start()
        return self

    def run(self):
        while not self.ended.wait(5e-4):
            self.most = max(self.most, self.now())

    def __exit__(self, *_):
        self.ended.set()
        self.join()

    @staticmethod
    def now():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of memory")
def test_beside_the_parameters_loading_holds_one_and_a_half_of_them_at_the_most(tmp_path, tokenizer_text):
    """Not the files besides, nor all shards of a parameter once more: 184 MiB in all, the largest 32, as float32."""
    sizes = {64: 8192, 32: 1024, 48: 4096, 16: 512}
    config = GOLDEN["llama"]["config"] | {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096}
    shapes = {name: tuple(sizes[n] for n in shape) for name, shape in GOLDEN["llama"]["shapes"].items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(tokenizer_text)
    kind = np.dtype(ml_dtypes.bfloat16)
    ones = {name: Planned(kind, shape, lambda shape=shape: np.ones(shape, kind)) for name, shape in shapes.items()}
    write_safetensors(tmp_path / "model.safetensors", ones)
    code = f"from tests.hub.test_folder import tell_memory_of_loading as tell; tell({str(tmp_path)!r})"
    args, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    told = subprocess.run(args, cwd=root, capture_output=True, text=True, check=True).stdout
    most, own, largest = map(int, told.split())
    assert most > 0.9 * own, "the measure sees the parameters"
    assert most < own + 1.5 * largest


def tell_memory_of_loading(folder):
    """In a process of its own, which has no memory from before to use again; on eight devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    load_shape(folder)  # what reading a tokenizer imports is no part of it
    with _Held() as held:
        model, _ = sepjax.load(folder, param_dtype="float32", mesh=mesh)
    own = [sum(shard.data.nbytes for shard in x.addressable_shards) for x in leaves(model)]
    print(held.most - held.before, sum(own), max(own))


def test_older_keys_mean_the_same(make):
    def shape(name, **changes):
        config = {k: v for k, v in GOLDEN[name]["config"].items() if k != "rope_parameters"} | changes
        family = next(f for f in FAMILIES if config["model_type"] in f.model_types)
        return family.read_config(Fields("config.json", config))

    def new(name):
        config = GOLDEN[name]["config"]
        family = next(f for f in FAMILIES if config["model_type"] in f.model_types)
        return family.read_config(Fields("config.json", config))

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16}
    assert shape("llama-3.1", rope_theta=500.0, rope_scaling=scaling) == new("llama-3.1")
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert shape("llama-yarn", rope_scaling=yarn) == new("llama-yarn")
    assert shape("pythia", rotary_pct=0.5, rotary_emb_base=10000) == new("pythia")
    assert shape("llama", rope_scaling={"type": "linear", "factor": 2.0}).rope.scaling == "linear"
    assert shape("mistral", sliding_window=32).sliding_window == 32


def test_files_of_the_bare_model_and_buffers_of_old_ones(make):
    folder, written = make("gpt2")
    bare = {name.removeprefix("transformer."): x for name, x in written.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 4, 4), bool)
    tiny.write_safetensors(folder / "model.safetensors", bare)
    expected, _ = sepjax.load(make("gpt2", "other")[0])
    jax.tree.map(np.testing.assert_array_equal, leaves(sepjax.load(folder)[0]), leaves(expected))


EMBEDDINGS = {"llama": "model.embed_tokens.weight", "mistral": "model.embed_tokens.weight"}
EMBEDDINGS |= {"pythia": "gpt_neox.embed_in.weight", "gpt2": "transformer.wte.weight"}
EMBEDDINGS |= {"falcon-7b": "transformer.word_embeddings.weight"}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_tied_config_is_believed_where_the_file_says_the_same(make, name, tmp_path):
    """Logits of transformers 5 for such files are those of the file's head; older files carry the tied head too."""
    head = "embed_out.weight" if name == "pythia" else "lm_head.weight"
    folder, written = make(name, config={"tie_word_embeddings": True}, files=2)
    weights = {key: x for key, x in written.items() if key != head}
    for path in folder.glob("model*"):
        path.unlink()
    tiny.write_safetensors(folder / "model.safetensors", weights | {head: weights[EMBEDDINGS[name]]})
    same, tokenizer = sepjax.load(folder)
    assert same.config.tie_embeddings
    own = np.nextafter(weights[EMBEDDINGS[name]], 9, dtype=np.float32)
    tiny.write_safetensors(folder / "model.safetensors", weights | {head: own})
    other, _ = sepjax.load(folder)
    np.testing.assert_array_equal(other.output_embedding(), own)
    np.testing.assert_array_equal(other.embedding.embedding[...], weights[EMBEDDINGS[name]])
    assert load_shape(folder)[0] == dataclasses.replace(same.config, tie_embeddings=False) == other.config
    save_folder(other, tokenizer, tmp_path / "out", like=folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(sepjax.load(tmp_path / "out")[0].output_embedding(), own)


def spoil_config(**changes):
    def spoil(folder, written):
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))

    return spoil


def spoil_tensors(change):
    return lambda folder, written: tiny.write_safetensors(folder / "model.safetensors", change(dict(written)))


def spoil_index(**places):
    def spoil(folder, written):
        weight_map = dict.fromkeys(written, "model.safetensors") | places
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def write(name, content):
    return lambda folder, written: (folder / name).write_bytes(content)


def stretched(name, size):
    """With a hole at its end, which takes no room."""
    return lambda folder, written: os.truncate(folder / name, size)


def pipe(name):
    """In place of a file: opening it waits for a writer, for ever."""

    def spoil(folder, written):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def endless(name):
    def spoil(folder, written):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return spoil


def stale_index(folder, written):
    tiny.write_safetensors(folder / "model-00001-of-00001.safetensors", written)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(written, "model-00001-of-00001.safetensors")}))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config(model_type="mamba"), r"model_type='mamba': supported architectures are llama, mistral"),
        (spoil_config(model_type="lama"), r"did you mean 'llama'"),
        (spoil_config(model_type="gone"), r"model_type=None"),
        (spoil_config(hidden_size="gone"), r"lacks the key 'hidden_size'"),
        (spoil_config(hidden_size="32"), r"hidden_size='32': expected a whole number"),
        (spoil_config(num_key_value_heads=3), r"num_heads=4 is not a multiple of model.num_kv_heads=3"),
        (spoil_config(num_hidden_layers=2**31 - 1), r"2147483647 layers, but there are 21 tensors"),
        (
            spoil_config(vocab_size=2**31 - 1, hidden_size=2**31 - 8),
            r"vocab_size = 2147483647 and embed_dim = 2147483640",
        ),
        (spoil_config(num_attention_heads=2**30, head_dim=2**30), r"num_heads \* head_dim = 1152921504606846976 and"),
        (spoil_config(quantization_config={"quant_method": "awq"}), r"quantization_config=.+quantised checkpoints"),
        (stale_index, r"has model.safetensors and an index of other files, model.safetensors.index.json"),
        (
            write("adapter_config.json", b"{}"),
            r"adapter_config.json' is an adapter beside .*adapter=\.\.\. of sepjax\.load, --adapter of sepjax convert",
        ),
        (write("adapter_model.safetensors", b""), r"adapter_model.safetensors' is an adapter"),
        (stretched("config.json", 100_000_001), r"config.json' has 100000001 bytes; at most"),
        *((pipe(name), f"{name}' is not an ordinary file") for name in ("tokenizer.json", INDEX, "model.safetensors")),
        *(
            (endless(name), f"{name}' is not an ordinary file")
            for name in ("tokenizer_config.json", "model.safetensors")
        ),
        *((spoil("config.json"), "a folder without checkpoints or config.json") for spoil in (pipe, endless)),
        (spoil_config(hidden_act="relu"), r"hidden_act='relu': supported are 'silu'"),
        (spoil_config(rope_parameters={"rope_type": "longrope"}), r"rope type 'longrope'"),
        (spoil_config(rope_parameters=[1]), r"rope_parameters=\[1\]: expected a JSON object"),
        (spoil_config(num_hidden_layers=3), r"lacks tensor 'model.layers.2.+ and 8 more"),
        (spoil_config(num_hidden_layers=1), r"has tensor 'model.layers.1.+does not have"),
        (spoil_config(intermediate_size=50), r"up_proj.weight' has shape \[48, 32\], expected \[50, 32\]|gate_proj"),
        (spoil_config(vocab_size=63), r"the tokenizer has 64 tokens, but config.json has vocab_size=63"),
        (spoil_config(sepllm={"windov_size": 3}), r"unknown setting 'sepllm.windov_size'; did you mean 'window_size'"),
        (spoil_config(sepllm={"layer_windows": [3]}), r"layer_windows has 1 windows but the model has 2"),
        (spoil_config(sepllm=7), r"sepllm is 7, expected a JSON object"),
        (write("config.json", b"{"), r"config.json' is not JSON"),
        (write("config.json", b"[]"), r"config.json' holds a list"),
        (write("tokenizer.json", b"{}"), r"cannot read tokenizer"),
        (write("model.safetensors", b"\x80\x04K\x01."), r"not a complete safetensors file"),
        *(
            (write(name, POINTER), f"{name}'? is a pointer of Git LFS")
            for name in ("tokenizer.json", "model.safetensors")
        ),
        (spoil_tensors(lambda w: {k: x for k, x in w.items() if k != Q}), f"lacks tensor {Q!r};"),
        (spoil_tensors(lambda w: w | {Q: w[Q].T[:16]}), r"q_proj.weight' has shape \[16, 32\], expected \[32, 32\]"),
        (spoil_tensors(lambda w: w | {Q: np.ones((32, 32), np.uint8)}), r"q_proj.weight' holds uint8 numbers; quant"),
        (spoil_tensors(lambda w: w | {"model.layers.0.self_attn.q_norm.weight": w[Q]}), r"q_norm.weight'.+does not"),
        (
            spoil_index(**{Q: "../secret.safetensors"}),
            f"tensor {Q!r} is in '../secret.safetensors', expected a file of",
        ),
        (spoil_index(**{Q: "/etc/passwd"}), r"is in '/etc/passwd'"),
        (spoil_index(**{Q: ".."}), r"is in '..'"),
        (spoil_index(**{Q: 5}), r"is in '5'"),
        (spoil_index(**{Q: "other.safetensors"}), f"lacks the file 'other.safetensors', in which .+ {Q!r}"),
        (spoil_index(ghost="model.safetensors"), r"lacks tensor 'ghost', which model.safetensors.index.json has there"),
        (write(INDEX, b'{"weight_map": []}'), r"weight_map is \[\]"),
    ],
)
def test_what_is_wrong_is_named(make, spoil, message):
    folder, written = make()
    spoil(folder, written)
    with pytest.raises(UserError, match=message):
        sepjax.load(folder)


def test_pickled_weights_are_not_read(make):
    folder, _ = make()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(HubError, match="may run code"):
        sepjax.load(folder)


def test_shapes_that_no_family_has_are_not_written(make, tmp_path):
    model, tokenizer = sepjax.load(make("gpt2")[0])
    model.config = dataclasses.replace(model.config, activation="silu")
    with pytest.raises(HubError, match=r"no architecture of transformers.+llama: a Llama has RMS norms.+gpt2: a GPT-2"):
        save_folder(model, tokenizer, tmp_path / "out")
    model, tokenizer = sepjax.load(make("llama", "l")[0])
    with pytest.raises(HubError, match=r"of another shape than the model: .*embed_dim"):
        save_folder(model, tokenizer, tmp_path / "out", like=make("llama", "o", config={"hidden_size": 64})[0])
    with pytest.raises(HubError, match="holds a model already"):
        save_folder(model, tokenizer, tmp_path / "l")


def test_a_folder_that_could_not_be_written_can_be_written_again(make, tmp_path, monkeypatch):
    model, tokenizer = sepjax.load(make("llama")[0])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_gate", lambda *_: 1 / 0)
        for folder in ("out", "new/one"):
            with pytest.raises(ZeroDivisionError):
                save_folder(model, tokenizer, tmp_path / folder)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and "out" in path.parts] == ["README.md"]
    assert not (tmp_path / "new").exists()
    save_folder(model, tokenizer, tmp_path / "out")
    assert sepjax.load(tmp_path / "out")[0].config == model.config
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_mistral_that_says_the_kinds_of_its_layers_is_a_ministral(make):
    """As transformers takes it."""
    kinds = ["sliding_attention", "full_attention"]
    for types, full in ((kinds, (1,)), (kinds[:1] * 2, ()), (None, ())):
        folder, _ = make("ministral", f"m{types}", config={"model_type": "mistral", "layer_types": types})
        config, _ = folder_shape(folder, dtype="float32")
        assert (config.sliding_window, config.full_layers) == (8, full)
    folder, _ = make("ministral", "full", config={"model_type": "mistral", "layer_types": kinds[1:] * 2})
    assert folder_shape(folder, dtype="float32")[0].sliding_window == 0


def test_a_control_token_without_an_embedding_is_left_out(make):
    """As of Gemma 3's text models, `<image_soft_token>`; an ordinary token is another matter."""
    folder, _ = make()
    file = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for special in (True, False):
        file["added_tokens"] = [{"id": 64, "content": "<image>", "special": special, **plain}]
        (folder / "tokenizer.json").write_text(json.dumps(file))
        if special:
            _, tokenizer = folder_shape(folder, dtype="float32")
            assert (tokenizer.vocab_size, tokenizer.control_id("<image>")) == (64, None)
        else:
            with pytest.raises(HubError, match=r"has 65 tokens, but config\.json has vocab_size=64"):
                folder_shape(folder, dtype="float32")


def test_a_hub_id_is_looked_up_in_the_cache_and_never_fetched_unasked(make, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    with pytest.raises(HubError, match=r"there is no 'someone/model' here.+--download"):
        sepjax.load("someone/model")
    folder, _ = make()
    home = tmp_path / "cache" / "models--someone--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, home / "snapshots" / ("0" * 40))
    model, _ = sepjax.load("someone/model")
    jax.tree.map(np.testing.assert_array_equal, leaves(model), leaves(sepjax.load(folder)[0]))


def test_weights_are_fetched_once(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.model"]
    others = ["consolidated.safetensors", "consolidated.00.safetensors", "fp16/model.safetensors", "model.py"]
    fetched = []

    def download(name, *, allow_patterns, ignore_patterns=None, local_files_only):
        files = filter_repo_objects(there + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.extend(files)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("someone/model", download=True) == tmp_path
    assert fetched == there


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the --workdir"):
        sepjax.load(tmp_path / "nothing")
    with pytest.raises(LoadError, match=r"a folder without checkpoints or config\.json"):
        sepjax.load(tmp_path)
    with pytest.raises(UserError, match="dtype='float8' must be"):
        sepjax.load(tmp_path, dtype="float8")


def test_no_pickle_and_no_remote_code():
    root = Path(sepjax.__file__).parent
    banned = re.compile(
        r"\b(pickle|torch\.load|joblib|dill|shelve|marshal)\b|\beval\(|\bexec\(|allow_pickle=True|trust_remote_code=True"
    )
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for path in [*root.rglob("*.py"), *root.parent.glob("*.py")]
        for line in path.read_text().splitlines()
        if banned.search(line)
    }
    assert found == set()
    assert banned.search("x = pickle.load(f)")
    assert os.path.isdir(root)
