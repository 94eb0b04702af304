"""Every config file loads, validates and survives JSON; every mistake in flags or settings is answered in one line."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from sepjax import config as config_lib
from sepjax.command.flags import parse
from sepjax.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    TrainingConfig,
    field_types,
    from_json,
    layer_windows,
    load_config,
    to_json,
    validate,
    validate_attention,
    with_own_window,
)
from sepjax.config.checks import whole_numbers
from sepjax.flops import matmul_parameters

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "sep_tiny.py"
    path.write_text("from sepjax.config import Config\ndef get_config():\n    return Config()\n")
    return f"--config={path}"


def _parse(*arguments: str) -> Config:
    """Parses a command line of a program with a flag --workdir, in a namespace of its own."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    (config,) = parse(["program", *arguments], values, with_config=True)
    return config


# Config files.


def test_the_published_configs_are_there() -> None:
    baselines = ["dense_small.py", "fixed_interval_small.py", "sink_window_small.py"]
    assert {"sep_tiny.py", "sep_small.py", "sep_medium.py", "sep_large.py", "llama3_8b.py", *baselines} <= {*CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_file_loads_by_path_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = _parse(f"--config={ROOT / 'configs' / name}", "--config.training.seed=7")
    assert config == validate(config)
    assert config.training.seed == 7
    assert from_json(to_json(config)) == config
    config.training.seed = 0
    assert config == load_config(os.path.relpath(ROOT / "configs" / name, tmp_path))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_docstring_gives_its_command_hardware_and_result(name: str) -> None:
    text = (ROOT / "configs" / name).read_text()
    assert f"python train.py --config=configs/{name} --workdir=" in text
    assert "hardware" in text.lower()
    assert "result" in text.lower()


@pytest.mark.parametrize("name", ["dense_small", "sink_window_small", "fixed_interval_small"])
def test_baselines_change_one_field_of_sep_small(name: str) -> None:
    def leaves(config: Config) -> dict[str, Any]:
        pairs = ((path, path.split(".")) for path in field_types())
        return {path: _get(config, keys) for path, keys in pairs}

    small, baseline = (leaves(load_config(ROOT / "configs" / f"{n}.py")) for n in ("sep_small", name))
    assert {path for path in small if small[path] != baseline[path]} == {"attention.pattern"}


def _get(config: Any, keys: list[str]) -> Any:
    for key in keys:
        config = getattr(config, key)
    return config


@pytest.mark.parametrize(
    ("name", "millions"),  # published non-embedding parameters, or (llama) total, of the shapes
    [("sep_small", 85.06), ("sep_medium", 302.31), ("sep_large", 1208.60), ("llama3_8b", 8030.26)],
)
def test_shapes_have_the_published_size(name: str, millions: float) -> None:
    model = load_config(ROOT / "configs" / f"{name}.py").model
    D, V, L, F = model.embed_dim, model.vocab_size, model.num_layers, model.mlp_dim
    size = matmul_parameters(model)
    if name == "llama3_8b":
        size += V * D + (2 * L + 1) * D  # embedding, norms
    else:
        size += L * (4 * D + F + D) + (2 * L + 1) * 2 * D - V * D  # biases, norms; without the head
    assert size / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config.lora.targets=query,value"],
        ["--config.lora.targets", "query, value"],
        ["--config.lora.targets=query", "--config.lora.targets=value"],
        ["--config.lora.targets=('query', 'value')"],
    ],
)
def test_lists_of_texts_are_divided_at_commas(tiny: str, arguments: list[str]) -> None:
    config = _parse(tiny, "--workdir=x", "--config.lora.rank=2", "--config.training.init_from=y", *arguments)
    assert config.lora.targets == ("query", "value")


def test_there_are_about_sixty_settings() -> None:
    names = [name for name in field_types() if not name.startswith("model.sliding_rope.")]  # as model.rope
    assert len(names) <= 110  # 40 say the shapes of other projects' models


# Flags.


def test_flags_override_fields_with_their_types(tiny: str) -> None:
    config = _parse(
        tiny,
        "--workdir=x",
        "--config.training.steps=123",
        "--config.optimizer.learning_rate",
        "1e-2",
        "--config.attention.layer_windows=1,2,3,4",
        "--noconfig.attention.document_mask",
        "--config.attention.implementation=xla",
        "--config.model.rope.fraction=0.5",
        "--config.mesh.fsdp=-1",
        "--config.mesh.data=1",
    )
    expected = Config(
        model=ModelConfig(rope=RopeConfig(fraction=0.5)),
        attention=AttentionConfig(layer_windows=(1, 2, 3, 4), document_mask=False, implementation="xla"),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        training=TrainingConfig(steps=123),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    assert config == expected
    assert type(config.training.steps) is int


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.training.stpes=5"], "unknown flag --config.training.stpes; did you mean '--config.training.steps'"),
        (["--config.modle.vocab_size=5"], "did you mean '--config.model.vocab_size'"),
        (["--noconfig.attention.document_masks"], "unknown flag --noconfig.attention.document_masks"),
        (["--worksdir=x"], "unknown flag --worksdir; did you mean '--workdir'"),
        (["--config.training=5"], "unknown flag --config.training;"),
        (["--config.training.steps=abc"], "--config.training.steps=abc: expected a whole number$"),
        (["--config.training.steps=1.5"], "--config.training.steps=1.5: expected a whole number$"),
        (["--config.optimizer.learning_rate=fast"], "--config.optimizer.learning_rate=fast: expected a number$"),
        (["--config.attention.document_mask=perhaps"], "mask=perhaps: expected true or false, or no value$"),
        (["--config.attention.layer_windows=abc"], r"layer_windows=\('abc',\) has the wrong type, expected tuple\[int"),
        (["--config.attention.pattern=seperator"], "did you mean 'separator'"),
        (["steps=5"], "unexpected argument 'steps=5'"),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_expected(tiny: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _parse(tiny, "--workdir=x", *arguments)


def test_without_a_config_file_the_error_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match=r"--config is required.*--config=configs/sep_tiny.py"):
        _parse("--workdir=x", "--config.training.steps=5")


def test_a_missing_config_file_is_answered_with_the_nearest_name(tiny: str) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*sep_tny.py'; did you mean 'sep_tiny.py'"):
        _parse(tiny.replace("sep_tiny", "sep_tny"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"no get_config\(\)"),
        ("def get_config():\n    return {'steps': 1}\n", "returned a dict, expected a Config"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "wrong.py")
    (tmp_path / "wrong.txt").write_text(text)
    with pytest.raises(ConfigError, match="is not a config file"):
        load_config(tmp_path / "wrong.txt")


PROGRAM = '''"""Says hello."""
import dataclasses, time
from concurrent.futures import ThreadPoolExecutor
from sepjax import interrupt
from sepjax.config import Config, UserError
from sepjax.command.flags import run_settings
from sepjax.command.settings import Settings

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Settings):
    config: Config
    mode: str = ""  # what to do

def main(settings):
    if settings.mode == "user":
        interrupt.need_not_wait_for(ThreadPoolExecutor(1).submit(time.sleep, 200).done)
        raise UserError("the text\\nis empty")
    if settings.mode == "system":
        open("/nowhere/at/all")
    if settings.mode == "bug":
        raise RuntimeError("a real bug")
    print("steps", settings.config.training.steps)

if __name__ == "__main__":
    run_settings(Mine, main, __doc__)
'''


@pytest.mark.parametrize(
    ("arguments", "code", "stdout", "stderr"),
    [
        (["--config.training.steps=55"], 0, "steps 55\n", ""),
        (["--mode=user"], 2, "", "error: the text is empty\n"),  # at once, and not when a thread has ended
        (["--mode=system"], 2, "", "error: '/nowhere/at/all': No such file or directory; check the path\n"),
        (["--mdoe=user"], 2, "", "error: unknown flag --mdoe; did you mean '--mode'?\n"),
        (["--mode=bug"], 1, "", "Traceback"),
    ],
)
def test_a_program_ends_with_one_line_for_mistakes_and_a_traceback_for_bugs(
    tiny: str, tmp_path: Path, arguments: list[str], code: int, stdout: str, stderr: str
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), tiny, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=150)
    assert (result.returncode, result.stdout) == (code, stdout)
    assert result.stderr.startswith(stderr) if code == 1 else result.stderr == stderr


# Settings.


def test_dense_is_the_window_of_a_model_that_has_one() -> None:
    dense, separator = AttentionConfig(pattern="dense", cache_size=9), AttentionConfig()
    own = with_own_window(dense, ModelConfig(sliding_window=7))
    assert (own.pattern, own.num_sinks, own.window_size, own.cache_size) == ("sink_window", 0, 7, 9)
    assert with_own_window(dense, ModelConfig(sliding_window=10)).cache_size == 0, "there is no room in 9"
    assert validate_attention(own, 4) is own
    assert with_own_window(dense, ModelConfig()) is dense
    kept = with_own_window(separator, ModelConfig(sliding_window=7, full_layers=(1, 3)))
    assert kept == dataclasses.replace(separator, layer_reach=(7, 0, 7, 0))
    assert with_own_window(kept, ModelConfig(sliding_window=7, full_layers=(1, 3))) == kept
    assert layer_windows(kept, 4, 99) == (7, 64, 7, 64)
    mixed = with_own_window(dense, ModelConfig(sliding_window=7, full_layers=(1, 3)))
    assert validate_attention(mixed, 4) is mixed
    assert [n for n in layer_windows(mixed, 4, 99) if n < 99] == [7, 7]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(model=ModelConfig(num_layers=0)), "model.num_layers=0 must be 1 or more"),
        (Config(model=ModelConfig(norm="batchnorm")), "model.norm='batchnorm' is not one of"),
        (Config(model=ModelConfig(activation="relu")), "model.activation='relu' is not one of"),
        (Config(model=ModelConfig(position_embedding="alibi")), "model.position_embedding='alibi' is not one of"),
        (Config(model=ModelConfig(dtype="float23")), "model.dtype='float23' .*did you mean 'float32'"),
        (Config(model=ModelConfig(remat="dot")), "model.remat='dot' .*did you mean 'dots'"),
        (Config(model=ModelConfig(rope=RopeConfig(scaling="ntk"))), "model.rope.scaling='ntk' is not one of"),
        (Config(model=ModelConfig(rope=RopeConfig(factor=0.5))), "model.rope.factor=0.5 must be 1 or more"),
        (Config(model=ModelConfig(rope=RopeConfig(original_context=0))), "original_context=0 must be 1 or more"),
        (Config(model=ModelConfig(rope=RopeConfig(base=1.0))), "model.rope.base=1.0 must be above 1"),
        (Config(model=ModelConfig(rope=RopeConfig(attention_factor=-1.0))), "attention_factor=-1.0 must be 0 or more"),
        (Config(model=ModelConfig(rope=RopeConfig(beta_slow=32.0))), "beta_slow=32.0 must be below beta_fast=32.0"),
        (
            Config(model=ModelConfig(rope=RopeConfig(low_frequency_factor=4.0))),
            "low_frequency_factor=4.0 must be below",
        ),
        (Config(model=ModelConfig(norm_epsilon=0.0)), "model.norm_epsilon=0.0 must be above 0"),
        (Config(model=ModelConfig(sliding_window=-1)), "model.sliding_window=-1 must be 0 or more"),
        (Config(model=ModelConfig(norm_position="behind")), "model.norm_position='behind' is not one of"),
        (Config(model=ModelConfig(qk_norm="heads")), "model.qk_norm='heads' .*did you mean 'head'"),
        (Config(model=ModelConfig(norm="layernorm", qk_norm="head")), "qk_norm='head' needs model.norm=\"rmsnorm\""),
        (Config(model=ModelConfig(norm="layernorm", norm_offset=True)), "norm_offset=True needs model.norm"),
        (Config(model=ModelConfig(parallel_residual=True, norm_position="both")), 'needs model.norm_position="pre"'),
        (Config(model=ModelConfig(attention_bias=True, qkv_bias=True)), "qkv_bias=True means no bias of the output"),
        (Config(model=ModelConfig(logit_divisor=0.0)), "model.logit_divisor=0.0 must be above 0"),
        (Config(model=ModelConfig(residual_scale=float("inf"))), "model.residual_scale=inf must be above 0"),
        (Config(model=ModelConfig(final_softcap=-1.0)), "model.final_softcap=-1.0 must be 0 or more"),
        (
            Config(model=ModelConfig(sliding_window=4, full_layers=(2, 1))),
            r"full_layers=\(2, 1\) must be layers, 0 to 3",
        ),
        (Config(model=ModelConfig(full_layers=(1,))), "model.full_layers needs model.sliding_window"),
        (Config(model=ModelConfig(sliding_rope=RopeConfig())), "model.sliding_rope needs model.sliding_window"),
        (Config(model=ModelConfig(sliding_window=4, full_layers=(0, 1, 2, 3))), "full_layers has all 4 layers"),
        (Config(model=ModelConfig(no_rope_layers=(4,))), r"no_rope_layers=\(4,\) must be layers, 0 to 3"),
        (Config(model=ModelConfig(no_rope_layers=(0, 1, 2, 3))), "one at least must know positions"),
        (
            Config(model=ModelConfig(position_embedding="learned", no_rope_layers=(1,))),
            'need model.position_embedding="rope"',
        ),
        (
            Config(model=ModelConfig(sliding_window=4, sliding_rope=RopeConfig(fraction=0.5))),
            "sliding_rope.fraction=0.5 must be model.rope.fraction=1.0",
        ),
        (
            Config(model=ModelConfig(sliding_window=4, sliding_rope=RopeConfig(factor=0.5))),
            "model.sliding_rope.factor=0.5 must be 1 or more",
        ),
        (Config(attention=AttentionConfig(layer_reach=(8, 8))), "layer_reach has 2 numbers but the model has 4"),
        (Config(attention=AttentionConfig(layer_reach=(8, -1, 8, 8))), "layer_reach=-1 must be 0 or more"),
        (
            Config(attention=AttentionConfig("dense", layer_reach=(8, 8, 8, 8))),
            'layer_reach is not for pattern="dense"',
        ),
        (Config(model=ModelConfig(max_positions=0)), "model.max_positions=0 must be 1 or more"),
        (Config(model=ModelConfig(num_heads=4, num_kv_heads=3)), "num_heads=4 is not a multiple of .*num_kv_heads=3"),
        (Config(model=ModelConfig(head_dim=6, rope=RopeConfig(fraction=0.5))), "rotates 3 dimensions"),
        (Config(model=ModelConfig(rope=RopeConfig(fraction=1.5))), "at most head_dim"),
        (Config(model=ModelConfig(shared_norm=True)), "needs model.parallel_residual=True"),
        (Config(attention=AttentionConfig(pattern="sparse")), "attention.pattern='sparse' is not one of"),
        (Config(attention=AttentionConfig(separators="papers")), "did you mean 'paper'"),
        (Config(attention=AttentionConfig(num_sinks=-1)), "attention.num_sinks=-1 must be 0 or more"),
        (Config(attention=AttentionConfig(window_size=0)), "attention.window_size=0 must be 1 or more"),
        (Config(attention=AttentionConfig(interval=0)), "attention.interval=0 must be 1 or more"),
        (Config(attention=AttentionConfig(max_separators=-1)), "attention.max_separators=-1 must be 0 or more"),
        (Config(attention=AttentionConfig(capacity=-1)), "attention.capacity=-1 must be 0 or more"),
        (Config(attention=AttentionConfig(layer_windows=(8, 0, 8, 8))), "layer_windows=0 must be 1 or more"),
        (Config(attention=AttentionConfig(layer_windows=(8, 8))), "has 2 windows but the model has 4 layers"),
        (Config(attention=AttentionConfig(separators="ids")), "needs attention.separator_ids"),
        (
            Config(attention=AttentionConfig(num_sinks=4, max_separators=64, window_size=64, cache_size=132)),
            "cache_size=132 must exceed .* = 4 . 64 . 64 = 132; set cache_size to 133 or more",
        ),
        (
            Config(attention=AttentionConfig("gated", gate_layer=4)),
            r"gate_layer=4 must be 0 \(.*\) to 3: of the model's 4",
        ),
        (
            Config(attention=AttentionConfig("gated", gate_keep=65)),
            "gate_keep=65 of every gate_stretch=64 tokens are more",
        ),
        (
            Config(attention=AttentionConfig("gated", layer_windows=(9, 9, 64, 63))),
            "gate_stretch=64 exceeds the window 63 of a gated layer",
        ),
        (
            Config(attention=AttentionConfig("gated", kept_layers=(1, 3))),
            "kept_layers has 1, below gate_layer=2: nothing is kept before",
        ),
        (Config(attention=AttentionConfig(kept_layers=(4,))), "kept_layers has 4; the model's layers are 0 to 3"),
        (
            Config(attention=AttentionConfig("sink_window", kept_layers=(1,))),
            "kept_layers is for patterns that keep .* pattern='sink_window' does not; .*, or set layer_windows",
        ),
        (Config(attention=AttentionConfig("gated", gate_stretch=0)), "attention.gate_stretch=0 must be 1 or more"),
        (Config(training=TrainingConfig(gate_noise=-1.0)), "training.gate_noise=-1.0 must be 0 or more"),
        (Config(data=DataConfig(batch_size=0)), "data.batch_size=0 must be 1 or more"),
        (Config(data=DataConfig(num_workers=-1)), "data.num_workers=-1 must be 0 or more"),
        (Config(data=DataConfig(tokenizer_vocab_size=9000)), "tokenizer_vocab_size=9000 exceeds model.vocab_size=8192"),
        (Config(optimizer=OptimizerConfig(accumulation_steps=3)), "batch_size=8 is not a multiple of .*steps=3"),
        (Config(optimizer=OptimizerConfig(learning_rate=float("nan"))), "learning_rate=nan must be 0 or more"),
        (Config(optimizer=OptimizerConfig(z_loss=-1.0)), "optimizer.z_loss=-1.0 must be 0 or more"),
        (Config(optimizer=OptimizerConfig(b2=1.0)), "optimizer.b2=1.0 must be 0 or more and below 1"),
        (Config(optimizer=OptimizerConfig(clip_norm=0.0)), "optimizer.clip_norm=0.0 must be above 0"),
        (Config(training=TrainingConfig(steps=0)), "training.steps=0 must be 1 or more"),
        (
            Config(model=ModelConfig(position_embedding="learned", max_positions=128)),
            "sequence_length=256 exceeds model.max_positions=128",
        ),
        (Config(mesh=MeshConfig(data=-1, fsdp=-1)), "at most one may be -1"),
        (Config(mesh=MeshConfig(tensor=0)), "every axis needs a size of 1 or more"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(config: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config.training, "steps", "5"),
        lambda config: setattr(config.training, "steps", True),
        lambda config: setattr(config.training, "steps", 5.0),
        lambda config: setattr(config.optimizer, "learning_rate", None),
        lambda config: setattr(config.attention, "layer_windows", [1, 2, 3, 4]),
        lambda config: setattr(config.attention, "implementation", 3),
        lambda config: setattr(config, "mesh", {"data": 1}),
    ],
)
def test_a_config_file_that_sets_a_wrong_type_is_refused(change: Callable[[Config], None]) -> None:
    config = Config()
    change(config)
    with pytest.raises(ConfigError, match="has the wrong type, expected "):
        validate(config)


def test_a_whole_number_is_a_float() -> None:
    config = Config()
    config.optimizer.learning_rate = 1
    assert validate(config) is config


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 8), st.integers(1, 30))
def test_a_streaming_cache_must_have_room_for_more_than_its_zones(a: int, s: int, w: int, c: int) -> None:
    attention = AttentionConfig(num_sinks=a, max_separators=s, window_size=w, cache_size=c)
    if a + s + w < c:
        assert config_lib.validate_attention(attention, 4) is attention
    else:
        with pytest.raises(ConfigError, match=f"set cache_size to {a + s + w + 1} or more"):
            config_lib.validate_attention(attention, 4)


def test_layer_windows_are_the_patterns_own() -> None:
    assert layer_windows(AttentionConfig(window_size=5), 3, 100) == (5, 5, 5)
    assert layer_windows(AttentionConfig(layer_windows=(1, 2, 3)), 3, 100) == (1, 2, 3)
    assert layer_windows(AttentionConfig(pattern="dense", layer_windows=(1, 2, 3)), 3, 100) == (100, 100, 100)


# Saved configs.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"training": {"stpes": 5}}', "unknown setting 'training.stpes'; did you mean 'steps'"),
        ('{"training": {"steps": "5"}}', "training.steps='5' has the wrong type, expected int"),
        ('{"training": 5}', "training is 5, expected a JSON object"),
        ('{"training": {"st', "must be JSON"),
        ("", "must be JSON"),
    ],
)
def test_a_damaged_saved_config_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(text)


def test_a_saved_config_without_some_fields_takes_their_defaults() -> None:
    """So that runs saved before a field existed still load."""
    assert from_json('{"training": {"steps": 77}}') == Config(training=TrainingConfig(steps=77))


def test_field_types_covers_every_field_once() -> None:
    def count(cls: Any) -> int:
        fields = dataclasses.fields(cls)
        return sum(count(f.type) if dataclasses.is_dataclass(f.type) else 1 for f in fields)

    assert len(field_types()) == count(Config) - 1
    assert "model.weight_dtype" not in field_types(), "of loaded models, no setting of a run"
    assert field_types()["attention.implementation"] == "str | None"
    assert field_types()["attention.layer_windows"] == "tuple[int, ...]"


def test_lists_of_whole_numbers():
    assert whole_numbers("lengths", ["1", "20"]) == (1, 20)
    assert whole_numbers("lengths", []) == ()
    for wrong in (["2k"], ["0"], ["-1"], [""]):
        with pytest.raises(ConfigError, match="--lengths takes whole numbers of 1 or more"):
            whole_numbers("lengths", wrong)
