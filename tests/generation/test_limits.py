"""Warnings of what a model was never trained for: one line each, and none where all is well."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from sepjax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig
from sepjax.generation import limits
from sepjax.generation.limits import check_cache, trained_length, warn_of_cache, warn_of_length
from sepjax.sharding import make_mesh

ROPE, LEARNED = ModelConfig(max_positions=100), ModelConfig(max_positions=100, position_embedding="learned")
SLOT, ABSOLUTE = AttentionConfig(), AttentionConfig(stream_positions="absolute")


@pytest.mark.parametrize(
    ("config", "attention", "prompt", "new", "bounded", "words"),
    [
        (ROPE, SLOT, 101, 5, False, "101 tokens of prompt go beyond the 100 that"),
        (ROPE, SLOT, 90, 20, False, "90 tokens of prompt and 20 more go beyond the 100 that"),
        (ROPE, ABSOLUTE, 9, None, True, "9 tokens of prompt and endless more go beyond the 100 that"),
        (ROPE, SLOT, 90, 10, False, ""),
        (ROPE, SLOT, 900, None, True, ""),
        (LEARNED, SLOT, 90, 20, False, ""),
    ],
)
def test_a_text_beyond_the_trained_positions_gets_a_line(config, attention, prompt, new, bounded, words, capsys):
    warn_of_length(config, attention, prompt, new, 100, bounded=bounded)
    err = capsys.readouterr().err
    assert err.count("\n") == bool(words)
    assert words in err


@pytest.mark.parametrize(("slots", "words"), [(100, ""), (101, "a cache of 101 entries is larger than the 100 tokens")])
def test_a_cache_beyond_the_trained_positions_gets_a_line(slots, words, capsys):
    warn_of_cache(ROPE, AttentionConfig(window_size=8, max_separators=4, cache_size=slots), 100)
    # Dense is the window of a model that slides in all layers, in a cache of the size that was asked for.
    warn_of_cache(dataclasses.replace(ROPE, sliding_window=50), AttentionConfig("dense", cache_size=slots), 100)
    err = capsys.readouterr().err
    assert err.count(words) == err.count("\n") == 2 if words else not err


def test_the_trained_length_of_a_folder_is_its_models(tmp_path):
    assert trained_length(tmp_path, ROPE) == 100


def test_a_cache_beyond_all_memory_is_refused(monkeypatch):
    check_cache(ROPE, 1, 10_000, "model", "cache_size=10000")
    with pytest.raises(ConfigError, match=r"cache_size=9 asks for a cache of 2,000,000,000 entries, [\d,.]+ GiB"):
        check_cache(ROPE, 8, 2_000_000_000, "model", "cache_size=9")
    enough = 2 * ROPE.num_layers * ROPE.num_kv_heads * (ROPE.head_dim + 2) * 1000  # of 8 bits, and a scale of 16
    monkeypatch.setattr(limits, "_memory", lambda: enough)
    check_cache(ROPE, 1, 1000, "int8", "cache_size=1000")
    for slots, kind in ((1001, "int8"), (1000, "model")):
        with pytest.raises(ConfigError, match="GiB of memory"):
            check_cache(ROPE, 1, slots, kind, "cache_size=1000")


def test_a_cache_lies_on_one_device_unless_a_mesh_splits_it(monkeypatch):
    """Not over all that there are: two devices of room for 1000 slots do not make room for 2000."""
    room = 2 * ROPE.num_layers * ROPE.num_kv_heads * ROPE.head_dim * 4 * 1000
    devices = [SimpleNamespace(memory_stats=lambda: {"bytes_limit": room}) for _ in range(2)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    model = dataclasses.replace(ROPE, dtype="float32")
    check_cache(model, 1, 1000, "model", "cache_size=1000")
    with pytest.raises(ConfigError, match="cache_size=1001 asks for a cache of 1,001 entries"):
        check_cache(model, 1, 1001, "model", "cache_size=1001")
    monkeypatch.undo()
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4])):
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        check_cache(model, 2, 2000, "model", "cache_size=2000")
        for rows, slots in ((2, 2001), (3, 667)):  # three rows do not split, heads do
            with pytest.raises(ConfigError, match="on a device"):
                check_cache(model, rows, slots, "model", "cache_size")
