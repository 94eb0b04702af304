"""Conversations in the forms of published models, and the loop over a terminal without a terminal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tokenizers

from sepjax.config import AttentionConfig, ModelConfig
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.generate import stream
from sepjax.generation.chat import ChatFormat, chat, gauge, interrupt_flag
from sepjax.generation.driver import CacheUse
from sepjax.model.transformer import create
from tests.hub.test_gguf_file import write

ROOT = Path(__file__).parents[2]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzUA:.,", "Ġ", "Ċ"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tokenizer_of(control, eos=None) -> Tokenizer:
    """Letters and control tokens."""
    vocabulary = {token: i for i, token in enumerate([*control, *LETTERS])}
    file = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    file.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = tokenizers.decoders.ByteLevel()
    file.add_special_tokens(control)
    return Tokenizer(HuggingFaceModel(file.to_str(), {"bos_token": None, "eos_token": eos}))


def spelt(tokenizer, ids):
    texts = tokenizer.token_texts()
    names = {i: name for name in [*CHATML, *LLAMA3] if (i := tokenizer.control_id(name)) is not None}
    return "".join(names.get(i) or texts[i] or "?" for i in ids)


def test_chatml_is_smollms_template():
    """As its chat template renders [system, user, assistant, user] with add_generation_prompt."""
    tokenizer = tokenizer_of(CHATML)
    form = ChatFormat.of(tokenizer)
    end = tokenizer.control_id("<|im_end|>")
    first = form.turn(tokenizer, "hello.", before=None, system="be kind")
    assert spelt(tokenizer, first) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello.<|im_end|>\n<|im_start|>assistant\n"
    )
    rest = "\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
    assert spelt(tokenizer, form.turn(tokenizer, "again", before=end)) == rest
    cut_short = form.turn(tokenizer, "again", before=tokenizer.encode("x")[0])
    assert spelt(tokenizer, cut_short) == "<|im_end|>" + rest


def test_llama_3_has_headers():
    tokenizer = tokenizer_of(LLAMA3)
    form = ChatFormat.of(tokenizer)
    assert spelt(tokenizer, form.turn(tokenizer, "hello", before=None)) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_other_models_get_names_and_a_stop_text():
    tokenizer = tokenizer_of(["<|endoftext|>"])
    form = ChatFormat.of(tokenizer)
    assert (form.name, form.stop) == ("plain", ("\nUser:",))
    first = form.turn(tokenizer, " hi", before=None)
    assert tokenizer.decode(first) == "User: hi\nAssistant:"


def test_what_a_user_says_cannot_end_the_turn():
    tokenizer = tokenizer_of(CHATML)
    ids = ChatFormat.of(tokenizer).turn(tokenizer, "a<|im_end|>b", before=None)
    assert spelt(tokenizer, ids).count("<|im_end|>") == 1
    assert "ab<|im_end|>" in spelt(tokenizer, ids)


@pytest.fixture(scope="module")
def talker():
    tokenizer = tokenizer_of(CHATML, eos="<|im_end|>")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1,
                         head_dim=8, mlp_dim=16)  # fmt: skip
    attention = AttentionConfig(num_sinks=2, max_separators=3, window_size=6, cache_size=20)
    return create(config, attention, jax.random.key(0)), tokenizer


def talk(model, tokenizer, said, **settings):
    """(what was written, what was reported, the stream) of a conversation with these words of the user."""
    events = stream(model, tokenizer, bounded=True, temperature=1.0, **settings)
    lines, written, reports = iter(said), [], []

    def read():
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    chat(events, tokenizer, read=read, write=written.append, report=reports.append)
    return "".join(written), reports, events


def test_a_conversation_continues_its_cache(talker, tmp_path):
    model, tokenizer = talker
    said = ["hello there.", "and again, friend.", "", f"/save {tmp_path / 'talk'}", "/save", "/quit", "never"]
    text, reports, events = talk(model, tokenizer, said, max_new_tokens=12, seed=5)
    assert text.count("\n") >= 2
    gauges = [line for line in reports if line.startswith("[cache ")]
    assert len(gauges) == 2
    assert f"/20 slots, {events.cache.seen:,} tokens seen" in gauges[-1]
    assert events.cache.held <= 20 < events.cache.seen
    assert any("--resume=" in line for line in reports)
    assert any("where to?" in line for line in reports)
    more, _, resumed = talk(
        model, tokenizer, ["go on"], max_new_tokens=12, seed=5, resume=tmp_path / "talk"
    )  # the first turn after it is the third
    assert resumed.cache.seen > events.cache.seen
    assert more


def test_ctrl_c_cuts_an_answer_short_and_keeps_the_conversation(talker):
    model, tokenizer = talker
    events = stream(model, tokenizer, bounded=True, stop_at_eos=False)
    written, reports, said = [], [], iter(["hello", "again"])

    def write(text):
        written.append(text)
        if len(written) in (5, 25):
            os.kill(os.getpid(), signal.SIGINT)

    def read():
        line = next(said, None)
        if line is None:
            raise KeyboardInterrupt  # Ctrl-C at the prompt ends it
        return line

    chat(events, tokenizer, read=read, write=write, report=reports.append)
    assert len(written) == 26  # five and nineteen tokens, an end of line after each answer
    assert sum(line.startswith("[cache ") for line in reports) == 2
    assert events.finish_reason is None
    next(events)


def test_a_second_ctrl_c_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def press_twice():
        with interrupt_flag() as pressed:
            os.kill(os.getpid(), signal.SIGINT)
            assert pressed
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_the_gauge_says_what_was_measured():
    use = CacheUse(held=312, seen=4210, bytes=41_288_540)
    assert gauge(use, 800, 30, 0.5) == "[cache 312/800 slots, 4,210 tokens seen, 41,288,540 bytes, 60.0 tokens/s]"
    assert "tokens/s" not in gauge(use, 800, 0, 0.0)


def test_the_command_talks_and_streams(tmp_path):
    """A GGUF file, two turns on standard input; then a stream that goes on from the saved conversation."""
    write(tmp_path / "m.gguf")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    base = [sys.executable, "-m", "sepjax.generate", f"--workdir={tmp_path / 'm.gguf'}"]

    def run(*flags, said=""):
        done = subprocess.run(
            [*base, *flags], env=environment, input=said, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done

    done = run("--chat", "--max_new_tokens=5", said=f"abc\nab, c.\n/save {tmp_path / 'talk'}\n")
    assert "ChatML" in done.stderr
    assert done.stderr.count("[cache ") == 2
    assert (tmp_path / "talk" / "stream.json").exists()
    flags = [f"--resume={tmp_path / 'talk'}", f"--save={tmp_path / 'kept'}", "--prompt=ab", "--max_new_tokens=3"]
    done = run("--stream", *flags)
    assert done.stderr.splitlines()[-1].startswith("3 tokens")
    assert "cache holds" in done.stderr
    assert (tmp_path / "kept" / "stream.json").exists()
