"""The training bench: both models run, and its table and JSON say what was measured."""

import dataclasses
import json

import numpy as np
import pytest

from sepjax.bench import training as bench
from sepjax.config import AttentionConfig, Config, ConfigError, DataConfig, ModelConfig
from sepjax.flops import Peak, training_flops

CONFIG = Config(
    model=ModelConfig(vocab_size=61, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32),
    attention=AttentionConfig(num_sinks=2, window_size=4, implementation="reference"),  # compiles in half the time
    data=DataConfig(tokenizer_vocab_size=61),
)
SETTINGS = bench.Settings(lengths=(16, 64), tokens=512, density=0.2, repeats=1, seconds=0.0)
PEAK = Peak(1e9, "for the test")


@pytest.mark.soak  # two steps are compiled; its rows and its refusals are below
def test_writes_a_table_and_json_with_mfu_by_the_pairs_of_the_mask(capsys, tmp_path):
    settings = dataclasses.replace(SETTINGS, lengths=(16,))
    bench.main(CONFIG, settings, str(tmp_path / "bench.json"))
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["settings"] == json.loads(json.dumps(dataclasses.asdict(settings)))
    assert report["config"]["model"]["vocab_size"] == 61
    (row,) = report["rows"]
    assert (row["length"], row["rows"]) == (16, 32)

    config, dense = bench._both(CONFIG, settings, 16)
    is_separator = bench.random_batch(config, settings.density).is_separator
    i, j = np.indices((16, 16))
    visible = (j <= i) & (is_separator[:, None, :] | (j < 2) | (i - j < 4))
    peak = float(report["peak"].split()[0]) * 1e12
    for c, speed, pairs in ((config, row["model"], visible.sum() / 32), (dense, row["dense"], 16 * 17 // 2)):
        assert speed["tokens_per_second"] == pytest.approx(16 * 32 / speed["timing"]["milliseconds"] * 1e3)
        assert f"{speed['tokens_per_second']:,.0f}" in printed
        assert speed["attention_fraction"] == pytest.approx(pairs / (16 * 17 // 2))
        assert speed["mfu"] == pytest.approx(speed["tokens_per_second"] * training_flops(c, pairs) / peak, rel=0.01)


def test_lengths_have_the_same_tokens_in_a_micro_batch():
    settings = dataclasses.replace(SETTINGS, accumulation_steps=3)
    for length, rows in ((16, 96), (64, 24), (1024, 3)):
        for config in bench._both(CONFIG, settings, length):
            assert (config.data.sequence_length, config.data.batch_size) == (length, rows)
            assert config.optimizer.accumulation_steps == 3


def test_a_config_that_cannot_be_compared_is_an_error():
    dense = dataclasses.replace(CONFIG, attention=AttentionConfig(pattern="dense"))
    with pytest.raises(ConfigError, match="the baseline itself"):
        next(bench.measure(dense, SETTINGS, PEAK))
    model = dataclasses.replace(CONFIG.model, position_embedding="learned", max_positions=32)
    with pytest.raises(ConfigError, match=r"--lengths=64 exceeds model\.max_positions=32"):
        next(bench.measure(dataclasses.replace(CONFIG, model=model), SETTINGS, PEAK))
