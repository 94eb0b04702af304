"""What is stored with a model: who takes it, who does not, and what is said about it. No test here decodes a token."""

import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import pytest

import sepjax
from sepjax import Generator, kept
from sepjax.config import AttentionConfig, ConfigError, under
from sepjax.generation.saved import StreamStateError
from sepjax.hub.families import ATTENTION as OURS
from sepjax.hub.packaged import PACKAGES
from sepjax.keeping.layers import split_memory
from sepjax.pictures import kept_text
from sepjax.pictures.kept import Frame
from sepjax.programs import chat, generate, layers, serve
from sepjax.programs.common import one_arm
from sepjax.programs.kept_line import kept_line
from tests.commands import command, refusal
from tests.generation.tiny import ATTENTION, tiny_model, tiny_tokenizer
from tests.hub.test_gguf_file import CONFIG, write

STORED = "sink_window a=2 n=16 c=18"
KEPT = one_arm(STORED, ATTENTION, 2)


@pytest.fixture
def model():
    """It has something stored."""
    made = tiny_model()
    made.kept = KEPT
    return made


@pytest.fixture
def file(tmp_path):
    """A GGUF file with something stored beside it."""
    write(tmp_path / "m.gguf")
    (tmp_path / "m.kept.arm").write_text("sink_window n=9 c=20\n")
    return tmp_path / "m.gguf"


def test_bounded_caches_take_it_and_others_do_not(model):
    engine = Generator(model, tiny_tokenizer())
    assert (engine.attention, engine.kept) == (ATTENTION, KEPT)
    assert engine.stream().cache_size == 18
    assert engine.stream(max_new_tokens=3, bounded=True).cache_size == 18
    assert engine.stream(max_new_tokens=3).cache_size is None
    assert engine.prepared.attention == KEPT  # slots', and a server's
    own = Generator(model, tiny_tokenizer(), ATTENTION)
    assert (own.stream().cache_size, own.kept) == (20, ATTENTION)
    assert sepjax.stream(model, tiny_tokenizer()).cache_size == 18
    assert sepjax.stream(model, tiny_tokenizer(), attention=ATTENTION).cache_size == 20
    model.kept = None
    assert sepjax.stream(model, tiny_tokenizer()).cache_size == 20


def test_a_saved_stream_has_its_own_settings_unless_others_are_given(model, tmp_path):
    engine, watched = Generator(model, tiny_tokenizer()), one_arm("watched a=2 s=4 w=18 c=40", ATTENTION, 2)
    for name, attention in (("kept", None), ("own", ATTENTION), ("watched", watched)):
        Generator(model, tiny_tokenizer(), attention).stream().save(tmp_path / name)
    sizes = {"kept": 18, "own": 20, "watched": 40}
    assert {name: engine.stream(resume=tmp_path / name).cache_size for name in sizes} == sizes
    for given, name in ((ATTENTION, "kept"), (watched, "own")):
        with pytest.raises(StreamStateError, match=r"saved with sizes\.pattern="):
            Generator(model, tiny_tokenizer(), given).stream(resume=tmp_path / name)
    for name in sizes:  # as older versions saved them
        path = tmp_path / name / "stream.json"
        words = json.loads(path.read_text())
        del words["attention"]
        path.write_text(json.dumps(words))
    assert [engine.stream(resume=tmp_path / name).cache_size for name in ("kept", "own")] == [18, 20]
    with pytest.raises(StreamStateError, match="'watched', expected 'separator'; load the same model, and"):
        engine.stream(resume=tmp_path / "watched")
    (tmp_path / "own" / "stream.json").write_text(json.dumps(words | {"attention": {"pattern": 3}}))
    with pytest.raises(StreamStateError, match=r"stream.json': .*attention\.pattern.*; use another copy"):
        engine.stream(resume=tmp_path / "own")


@pytest.mark.parametrize("program", [chat, generate, serve])
def test_flags_take_its_place_and_never_mix_with_it(program, model):
    def attention(**flags):
        more = {"prompt": ("a",), "stream": True} if program is generate else {}
        return program.Settings(model="m", **more, **flags).attention(model)

    assert attention() == KEPT
    assert attention(cache_dtype="int8") == dataclasses.replace(KEPT, cache_dtype="int8")
    assert attention(cache_size=19) == dataclasses.replace(ATTENTION, cache_size=19)
    assert attention(window_size=5) == dataclasses.replace(ATTENTION, window_size=5)
    assert attention(pattern="separator") == ATTENTION
    assert attention(arm="separator s=2") == dataclasses.replace(ATTENTION, max_separators=2)


def test_an_answer_in_a_cache_that_grows_does_not_see_it(model):
    def settings(**flags):
        return generate.Settings(model="m", prompt=("a",), **flags)

    assert settings().attention(model) == ATTENTION
    assert settings(cache_dtype="int8").attention(model) == dataclasses.replace(ATTENTION, cache_dtype="int8")


def test_windows_by_layer_go_with_what_watched_layers_keep():
    arm = split_memory(dataclasses.replace(CONFIG, num_layers=4), [2], 200, AttentionConfig())
    assert arm.layer_windows
    for pattern in ("separator", "sink_window", "dense"):
        other = under(arm, pattern)
        assert (other.layer_windows, other.kept_layers) == ((), ())
    assert under(arm, "watched", num_sinks=1) == dataclasses.replace(arm, num_sinks=1)
    trained = AttentionConfig(layer_windows=(8, 9))  # windows of a model, whatever it keeps
    assert under(trained, "sink_window").layer_windows == (8, 9)


def test_it_lies_with_the_model_and_is_read_with_it(file):
    (loaded, _), stored = sepjax.load(file), file.parent / "m.kept.arm"
    assert (loaded.attention, loaded.kept) == (OURS, one_arm("sink_window n=9 c=20", OURS, CONFIG.num_layers))
    shipped = kept.find("smollm2-135m", file)
    assert shipped is not None
    assert kept.read(shipped, OURS, 30) == one_arm("@smollm2_800", OURS, 30)
    assert all(package.arm for package in PACKAGES.values())
    for content, message in (
        ("sink_window n=0", "window_size=0"), ("dense", "no bounded cache"), ("separator; sink_window", "has 2 arms"),
        ("@smollm2_800", "another file"), ("separator ids=@x.npy", "another file"), ("", "no arm"),
        ("separator model=x", "model=x"), ("watched windows=9", "layer_windows has 1"), ("sink_window\xff", "utf-8"),
    ):  # fmt: skip
        stored.write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=rf"m\.kept\.arm' sets what .*{message}.*; fix or delete the file"):
            kept.read(stored, OURS, CONFIG.num_layers)
    with pytest.raises(ConfigError, match="fix or delete the file"):
        sepjax.load(file)
    stored.unlink()
    assert kept.find(file, file) is None
    os.mkfifo(stored)
    with pytest.raises(ConfigError, match="not an ordinary file"):
        kept.read(stored, OURS, CONFIG.num_layers)


def test_the_first_line_says_what_is_kept_and_why(file, tmp_path, capfd, monkeypatch):
    loaded, tokenizer = sepjax.load(file)
    Generator(loaded, tokenizer).stream().save(tmp_path / "talk")
    stored, saved = f"{tmp_path}/m.kept.arm", f"--resume={tmp_path}/talk"
    other = "change with --arm=... or --pattern=...)"
    for flags, line in (
        ((), f"20 entries per layer, for recent tokens only (set by {stored}, stored with the model; {other}"),
        (
            ("--cache_size=700",),
            f"700 entries per layer, for recent tokens and separators (set by --cache_size, replacing {stored}, ",
        ),
        ((saved,), "20 entries per layer, for recent tokens only (as in the saved stream)"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        ended = command(capfd, "chat", f"--model={file}", *flags)
        assert ended.code == 0, ended.err
        assert f"KV cache: {line}" in ended.err
    said = refusal(capfd, "chat", f"--model={file}", saved, "--arm=separator s=2 w=6 c=20")
    assert "saved with sizes.pattern='sink_window', expected 'separator'" in said
    settings = chat.Settings(model=str(file))
    (tmp_path / "m.kept.arm").unlink()
    loaded.kept = None
    line = kept_line(settings, loaded)
    assert f"not measured for this model: sepjax layers --model={file} --text=FOLDER searches" in line
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    line = kept_line(chat.Settings(workdir=str(tmp_path / "run")), loaded)
    assert (
        line == f"KV cache: 800 entries per layer, for recent tokens and separators (the model's own settings; {other}"
    )


def test_layers_stores_it_where_the_model_has_no_mask_of_its_own(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, stored = tmp_path / "run", tmp_path / "m.kept.arm"
    run.mkdir()
    (run / "config.json").touch()
    for path, own, output, place in (
        (file, OURS, stored, stored),
        (run, OURS, Path("layers.arm"), run / kept.NAME),  # trained so
        (run, dataclasses.replace(OURS, pattern="dense"), run / kept.NAME, run / kept.NAME),
    ):
        settings = layers.Settings(model=str(path), text="x")
        assert layers._output(settings, own) == (output, place)
        written = layers._written(settings, output, place)
        assert ("stored in" in written, f"copied to {place}" in written) == (output == place, output != place)
    (run / "config.json").unlink()  # a converted model
    assert layers._output(layers.Settings(model=str(run), text="x"), OURS)[0] == run / kept.NAME
    settings = layers.Settings(model=str(file), text="x", output="mine.arm")
    assert layers._output(settings, OURS)[0] == Path("mine.arm")


def test_a_picture_shows_what_the_cache_keeps(model, monkeypatch):
    monkeypatch.setattr("sepjax.pictures.kept._frames", lambda *_: [Frame(0, 0, 0, "")])
    assert kept_text(model, tiny_tokenizer(), "One; two.").title.startswith("sink_window: 2 sinks, window 16")
