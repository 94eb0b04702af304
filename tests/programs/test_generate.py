"""`sepjax generate` and `sepjax chat` within this process: what they print, keep, warn of and refuse."""

import dataclasses
import errno
import gzip
import inspect
import io
import json
import sys
import types
import weakref

import jax
import numpy as np
import pytest

import sepjax
from sepjax import loading
from sepjax.config import AttentionConfig, ConfigError, validate_attention
from sepjax.generation import chat
from sepjax.generation.conversation import conversation_of
from sepjax.generation.prompts import encode_prompts
from sepjax.measure import counted_compilations
from sepjax.model.transformer import split
from sepjax.programs import answer_lines, generate
from sepjax.programs.many import Many, asked_of
from tests.commands import command, refusal
from tests.generation.tiny import ATTENTION, SHAPE, tiny_tokenizer
from tests.hub.test_gguf_file import CONFIG, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GGUF file: a pretrained model that is small, with weights at random."""
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    write(path)
    return f"--model={path}"


@pytest.mark.soak  # two rows, programs of their own; one prompt is below, batches are tests/test_generate.py
def test_a_batch_is_what_the_library_answers(model, held, tmp_path, capfd):
    (tmp_path / "prompt.txt").write_text("ab, c.", encoding="utf-8-sig")
    sampling = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 4}
    flags = [f"--{name}={value}" for name, value in sampling.items()]
    flags += ["--prompt=abc", f"--prompt_file={tmp_path}/prompt.txt", "--max_new_tokens=6", "--stop=zzz"]
    ended = command(capfd, "generate", model, *flags, "--pattern=dense")
    assert ended.code == 0, ended.err
    loaded, tokenizer = sepjax.load(model.removeprefix("--model="))
    prompts = ["abc", "ab, c."]
    expected = sepjax.generate(
        loaded, tokenizer, prompts, max_new_tokens=6, stop="zzz", attention=AttentionConfig(pattern="dense"), **sampling
    )
    pairs = zip(prompts, expected, strict=True)
    assert ended.out == "".join(f">>> {prompt}\n{answer.text}\n\n" for prompt, answer in pairs)
    seen = sum(answer.cache.seen for answer in expected)
    assert f"cache holds {seen} of {seen} tokens (100.0%)" in ended.err.splitlines()[-1]
    assert held == [0], "the weights are there once while a batch is answered"


@pytest.mark.soak  # as above; variables in templates: generation/test_chat.py
def test_template_variables_reach_the_template(tmp_path, capfd):
    write(tmp_path / "m.gguf", tokenizer__chat_template="{{ messages[0].content }}{{ 'c' if brief else 'b' }}")
    flags = ["--apply_chat_template", "--prompt=a", "--prompt=b", "--max_new_tokens=6", "--stop=zzz", "--pattern=dense"]
    ended = command(capfd, "generate", f"--model={tmp_path}/m.gguf", '--template_variables={"brief": true}', *flags)
    assert [line for line in ended.out.splitlines() if line.startswith(">>> ")] == [">>> ac", ">>> bc"], ended.err


def test_an_answer_to_a_message_ends_where_the_template_ends_a_turn(tmp_path, capfd, monkeypatch):
    write(tmp_path / "m.gguf", tokenizer__chat_template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    given = []

    def asked(_, prompts, **options):
        given.append((options["stop"], options["stop_token_ids"]))
        raise ConfigError("that will do")

    monkeypatch.setattr(sepjax.Generator, "generate", asked)
    flags = [f"--model={tmp_path}/m.gguf", "--prompt=a", "--prompt=b", "--stop=zzz", "--stop_token_ids=3"]
    for more in ([], ["--apply_chat_template"]):
        assert "that will do" in command(capfd, "generate", *flags, *more).err
    end = sepjax.load(f"{tmp_path}/m.gguf")[1].control_id("<|im_end|>")
    assert given == [(("zzz",), (3,)), (["zzz"], [3, end])]


ARM = "--arm=separator a=1 s=4 w=6 c=20"  # of all tests here: the same programs


def test_a_conversation_is_kept_and_a_stream_goes_on_with_it(model, held, tmp_path, capfd, monkeypatch):
    said = f"abc\nab, c.\n/save {tmp_path / 'talk'}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    ended = command(capfd, "chat", model, ARM, "--max_new_tokens=5")
    assert ended.code == 0, ended.err
    assert "ChatML" in ended.err
    assert ended.err.count("[cache ") == 2
    assert (tmp_path / "talk" / "stream.json").exists()
    flags = [f"--resume={tmp_path / 'talk'}", f"--save={tmp_path / 'kept'}", "--prompt=ab", "--max_new_tokens=3"]
    ended = command(capfd, "generate", model, ARM, "--stream", *flags)
    assert ended.code == 0, ended.err
    assert ended.err.splitlines()[-1].startswith("3 tokens")
    assert "ended: --max_new_tokens is reached" in ended.err
    assert (tmp_path / "kept" / "stream.json").exists()
    words = json.loads((tmp_path / "kept" / "stream.json").read_bytes())
    with counted_compilations() as compiled:
        ended = command(
            capfd, "generate", model, ARM, "--stream", f"--resume={tmp_path / 'kept'}", "--max_new_tokens=2"
        )
    assert (ended.code, ended.err.splitlines()[-1][:8]) == (0, "2 tokens")  # 3 were no end
    assert compiled == [], "what goes on has the programs of what began"
    (tmp_path / "kept" / "stream.json").write_text(json.dumps(words | {"finish_reason": "eos"}))
    ended = command(capfd, "generate", model, ARM, f"--resume={tmp_path / 'kept'}")
    assert (ended.code, ended.out) == (2, "")
    assert "nothing to go on with: the stream in" in ended.err
    assert "has ended (eos); give it a --prompt" in ended.err
    assert held == [0, 0, 0, 0], "the weights are there once, in a conversation too"


PROMPTS = """\
"abc, ab. abc, ab. abc"

{"prompt": "ab", "id": "second"}
{"messages": [{"role": "user", "content": "c <|im_end|>"}], "id": 3}
"""


@pytest.fixture
def prompts(tmp_path):
    """A file of three prompts, and the flags that answer it with the programs of the tests here."""
    (tmp_path / "p.jsonl").write_text(PROMPTS)
    return [f"--prompts={tmp_path}/p.jsonl", ARM, "--max_new_tokens=4", "--batch_size=1"]


def test_a_file_of_prompts_is_answered_in_its_order_and_gone_on_with(
    model, prompts, held, tmp_path, capfd, monkeypatch
):
    ended = command(capfd, "generate", model, *prompts)
    assert ended.code == 0, ended.err
    assert "chat format: ChatML" in ended.err
    loaded, tokenizer = sepjax.load(model.removeprefix("--model="))
    attention = dataclasses.replace(loaded.attention, num_sinks=1, max_separators=4, window_size=6, cache_size=20)
    engine = sepjax.Generator(loaded, tokenizer, attention)
    chat = conversation_of(tokenizer, None)
    texts = ["abc, ab. abc, ab. abc", "ab", chat.turn("c <|im_end|>", before=None)[0]]
    ends = [{}, {}, {"stop": chat.stop, "stop_token_ids": chat.stop_token_ids}]
    expected = []
    for text, end, name in zip(texts, ends, [{}, {"id": "second"}, {"id": 3}], strict=True):
        events = list(engine.stream(text, max_new_tokens=4, bounded=True, **end))
        counts = {"prompt_tokens": len(encode_prompts(tokenizer, [text])[0]), "completion_tokens": len(events)}
        said = "".join(event.text for event in events)
        expected.append({**name, "text": said, "finish_reason": events[-1].finish_reason, **counts})
    assert [json.loads(line) for line in ended.out.splitlines()] == expected
    assert held == [0], "the weights are there once while it answers"
    del loaded, engine

    output, taken, add = tmp_path / "a.jsonl", [], answer_lines.Answers.add

    def full(self, new):
        if len(taken) == 1:
            raise OSError(errno.ENOSPC, "No space left")
        taken.append(list(new))
        add(self, new)

    monkeypatch.setattr(answer_lines.Answers, "add", full)
    same = ["generate", model, *prompts, f"--output={output}"]
    ended = command(capfd, *same)
    assert (ended.code, ended.out, output.exists()) == (2, "", False)
    partial = tmp_path / "a.jsonl.partial"
    assert f"1 of 3 answers are kept in {str(partial)!r}; the same command goes on" in ended.err
    with partial.open("ab") as file:
        file.write(b'{"number": 1, "tex')  # a kill came while it was written
    ended = command(capfd, *same, "--max_new_tokens=3")
    assert (ended.code, ended.out) == (2, "")
    assert "begun with max_new_tokens=4, now 3: give the same" in ended.err.splitlines()[-1]
    (tmp_path / "p.jsonl").write_text(PROMPTS.replace("abc, ab.", "abc"))
    assert "begun with other prompts: give the same" in command(capfd, *same).err.splitlines()[-1]
    (tmp_path / "p.jsonl").write_text(PROMPTS)
    monkeypatch.setattr(answer_lines.Answers, "add", lambda self, new: (taken.append(list(new)), add(self, new)))
    ended = command(capfd, *same)
    assert (ended.code, ended.out, taken) == (0, "", [[0], [1], [2]]), ended.err
    assert "1 of 3 answers were there already" in ended.err
    assert [json.loads(line) for line in output.read_text().splitlines()] == expected
    assert not partial.exists()
    assert "a.jsonl is there already; choose another" in refusal(capfd, *same)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "it is '[1]', expected a text, or an object with 'prompt' or 'messages'"),
        ('{"prompt": "a"', "it is not JSON: "),
        ('{"promt": "a"}', "it has 'promt', expected one of prompt, messages, tools, id; did you mean 'prompt'?"),
        ('{"id": "a"}', "it has neither, expected 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "it has 'prompt' and 'messages', expected 'prompt' or 'messages'"),
        ('{"prompt": 3}', "'prompt' is '3', expected a text"),
        ('{"prompt": "\\ud800"}', "'prompt' has half of a surrogate pair at character 0"),
        ('{"prompt": "a", "id": 1.5}', "'id' is '1.5', expected a text or a whole number"),
        ('{"prompt": "a", "tools": []}', "it has 'tools' beside 'prompt'"),
        ('{"messages": [{"role": "user"}]}', "messages[0] has no 'content'"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": "f"}',
            "'tools' is 'f', expected a list of objects",
        ),
    ],
)
def test_a_line_that_is_no_prompt_is_named_before_a_model_is_read(line, message, tmp_path, capfd):
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write(f'"a"\n\n{line}\n')
    said = refusal(capfd, "generate", "--model=/nowhere", f"--prompts={tmp_path}/p.jsonl.gz")
    assert f"p.jsonl.gz:3: {message}" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompts=p.txt", "--prompts=p.txt is to be JSON Lines, named .jsonl or .ndjson"),
        ("--prompts={folder}/none.jsonl", "none.jsonl"),
        ("--prompts={folder}/empty.jsonl", "empty.jsonl has no prompts; give one a line"),
        ("--prompts={folder}/p.jsonl --output={folder}", "it is a folder"),
        ("--prompts={folder}/p.jsonl --output=/dev/null", "--output=/dev/null is no regular file; leave it out"),
        ("--prompts={folder}/p.jsonl --template_variables={{}}", "p.jsonl', which has no conversations; leave it out"),
        ("--prompts={folder}/p.jsonl --prompt=a", "--prompt says what is continued, too; leave it out, or --prompts"),
        ("--prompts={folder}/p.jsonl --prompt_file=a", "--prompt_file says what is continued, too; leave it out, or"),
        ("--prompts={folder}/p.jsonl --stream", "--stream goes on with one text; leave it out, or --prompts"),
        ("--prompts={folder}/p.jsonl --resume=x", "--resume goes on with one text; leave it out, or --prompts"),
        ("--prompts={folder}/p.jsonl --save=x", "--save does nothing for an answer to --prompt"),
        ("--prompt=a --output=x", "--output does nothing without --prompts; leave it out, or add that"),
        ("--prompt=a --batch_size=3", "--batch_size does nothing without --prompts"),
        ("--prompt=a --logprobs", "--logprobs does nothing without --prompts"),
        ("--prompt=a --top_logprobs=3", "--top_logprobs does nothing without --prompts"),
    ],
)
def test_mistakes_about_files_of_prompts_are_one_line(flags, message, tmp_path, capfd):
    (tmp_path / "p.jsonl").write_text('"a"\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    words = [word.format(folder=tmp_path) for word in flags.split()]
    assert message in refusal(capfd, "generate", "--model=/nowhere", *words)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("separator n=8 q=3", "arm 1, 'separator n=8 q=3': unknown field 'q'"),
        ("seperator n=8", "unknown pattern 'seperator'; did you mean 'separator'"),
        ("separator n=many", "expected a whole number"),
        ("dense; separator n=8", "names 2 arms; give one"),
        ("separator n=8 model=x", "model=x is for windows of text"),
        ("@none", "cannot read 'none'"),
    ],
)
def test_mistakes_in_an_arm_are_told_before_a_model_is_loaded(arm, message, capfd):
    assert message in refusal(capfd, "generate", "--model=/nowhere", "--prompt=a", f"--arm={arm}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt=a --seed=3", "--seed does nothing where the best token is always taken"),
        ("--prompt=a --top_k=3", "--top_k does nothing where the best token is always taken"),
        ("--prompt=a --min_p=0.1 --temperature=0", "--min_p does nothing"),
        ("--prompt=a --pattern=dense --window_size=3", "--window_size does nothing for the dense pattern"),
        ("--prompt=a --save=x", "--save does nothing for an answer to --prompt; it is for --resume, --stream"),
        ("--prompt=a --cache_dtype=int4", "--cache_dtype='int4' is not one of"),
        ("--prompt=a --arm=@none", "none"),
        ("--prompt=a --arm=dense", "a cache that grows: leave out what bounds it (bounded=True, --arm, --cache_size"),
        ("--prompt=a --max_repeats=12", "--max_repeats does nothing for an answer to --prompt"),
        ("--prompt=a --pattern=watched --save=x", "--save does nothing for an answer to --prompt; it is for --resume"),
        ("--prompt=a --stream --pattern=sink_window --max_separators=3", "--max_separators does nothing for the sink"),
        ("--resume=x --apply_chat_template", "--apply_chat_template does nothing without a prompt"),
        ("--prompt=a --system=x", "--system does nothing for sepjax generate; it is for sepjax chat"),
        ("--prompt=a --max_new_tokens=0", "--max_new_tokens=0 must be 1 or more"),
        ("--prompt=a --prompt=b --resume=x", "--resume continues one prompt, got 2"),
        ("--prompt=a --prompt=b --stream", "--stream continues one prompt, got 2"),
        ("", "nothing to continue; give --prompt"),
        ("--prompt_file={folder}/latin.txt", "is not UTF-8 text"),
        ("--prompt_file={folder}/none.txt", "none.txt"),
        ("--prompt=a --stream --save={folder}", "latin.txt, which is not a saved stream"),
        ("--prompt=a --apply_chat_template", "has no chat template; leave out --apply_chat_template"),
        ("--prompt=a --template_variables={{}}", "--template_variables does nothing without --apply_chat_template"),
        ("--prompt=a --apply_chat_template --template_variables={{}}", "which has no chat template; leave it out"),
        ("--prompt=a --apply_chat_template --template_variables=a=1", "--template_variables=a=1 is not JSON: "),
        ("--prompt=a --apply_chat_template --template_variables=[1]", "[1] must be a JSON object"),
    ],
)
def test_mistakes_are_one_line(flags, message, model, tmp_path, capfd):
    (tmp_path / "latin.txt").write_bytes("Où".encode("latin-1"))
    words = [word.format(folder=tmp_path) for word in flags.split()]
    assert message in refusal(capfd, "generate", model, *words)


def test_a_model_of_short_texts_has_no_layers_to_choose(model, tmp_path, capfd):
    (tmp_path / "a.txt").write_text("a")
    said = refusal(capfd, "layers", model, f"--text={tmp_path}", f"--output={tmp_path}/a.arm")
    assert f"has {CONFIG.max_positions} positions, too few to tell" in said


def test_what_is_right_is_not_refused():
    for settings in (
        {"top_k": 3, "temperature": 1.0},
        {"top_p": 0.9, "sampling_defaults": True},
        {"pattern": "separator", "window_size": 3},
        {"stream": True, "cache_size": 800, "save": "x"},
        {"resume": "x", "prompt": (), "max_repeats": 3},
        {"resume": "x", "apply_chat_template": True},
        {"prompt": ("a", "b"), "pattern": "watched", "cache_size": 800, "max_separators": 3},
        {"cache_size": 800},
        {
            "prompt": (),
            "prompts": "p.jsonl",
            "output": "a",
            "batch_size": 3,
            "logprobs": True,
            "template_variables": "{}",
        },
        {"seed": 3, "sampling_defaults": True},
    ):
        assert generate.Settings(**{"model": "m", "prompt": ("a",)} | settings)


def test_a_window_does_nothing_for_a_model_that_is_dense_itself(model):
    loaded, _ = sepjax.load(model.removeprefix("--model="))
    loaded.attention = AttentionConfig(pattern="dense")
    settings = generate.Settings(model="m", prompt=("a",), window_size=3)
    with pytest.raises(ConfigError, match="--window_size does nothing for the dense pattern"):
        settings.attention(loaded)
    loaded.attention = AttentionConfig(pattern="sink_window")
    settings = generate.Settings(model="m", prompt=("a",), stream=True, max_separators=3)
    with pytest.raises(ConfigError, match="--max_separators does nothing for the sink_window pattern"):
        settings.attention(loaded)


def test_the_type_of_a_cache_goes_with_flags_and_with_an_arm(model):
    loaded, _ = sepjax.load(model.removeprefix("--model="))
    asked = {"model": "m", "prompt": ("a",), "stream": True, "cache_dtype": "int8"}
    own, arm = loaded.attention, generate.Settings(**asked, arm="sink_window n=9 c=20").attention(loaded)
    assert generate.Settings(**asked).attention(loaded) == dataclasses.replace(own, cache_dtype="int8")
    assert (arm.cache_dtype, arm.cache_size, own.cache_dtype) == ("int8", 20, "model")


def test_another_pattern_leaves_the_layers_of_the_own_one(model):
    loaded, _ = sepjax.load(model.removeprefix("--model="))
    own = AttentionConfig(pattern="gated", gate_layer=0, gate_stretch=4, kept_layers=(1,))
    loaded.attention = own
    for pattern in ("sink_window", "dense", "watched"):
        found = generate.Settings(model="m", prompt=("a",), pattern=pattern).attention(loaded)
        assert found == dataclasses.replace(own, pattern=pattern, kept_layers=())
        assert validate_attention(found, loaded.config.num_layers)
    for pattern in (None, "gated"):
        assert generate.Settings(model="m", prompt=("a",), pattern=pattern).attention(loaded) == own


@pytest.fixture
def held(monkeypatch):
    """Of each command: bytes of the loaded model's stacked parameters that still live when it answers."""
    loaded, held = [], []

    def load(*arguments, original=loading.load, **settings):
        found = original(*arguments, **settings)
        loaded[:] = map(weakref.ref, jax.tree.leaves(split(found[0])[1]["layers"]))
        return found

    def answering(module, name):
        original = getattr(module, name)

        def answer(*arguments, **settings):
            held.append(sum(x.nbytes for x in (found() for found in loaded) if x is not None))
            return original(*arguments, **settings)

        monkeypatch.setattr(module, name, answer)

    monkeypatch.setattr(loading, "load", load)
    for name in ("_answer_one", "_answer_all", "_answer_lines"):
        answering(generate, name)
    answering(chat, "chat")
    return held


@pytest.mark.soak  # a program of its own; an arm's is the same cache, and watched tokens are in generation/cache
def test_watched_answers_have_a_bounded_cache_and_weights_are_there_once(model, held, capfd):
    flags = ["--pattern=watched", "--window_size=20", "--max_separators=8", f"--cache_size={CONFIG.max_positions + 1}"]
    ended = command(capfd, "generate", model, "--prompt=abc", "--max_new_tokens=2", *flags)
    assert ended.code == 0, ended.err
    assert f"warning: a cache of {CONFIG.max_positions + 1} entries is larger than" in ended.err
    assert "ended:" not in ended.err
    assert held == [0]


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_an_arm_gives_answers_a_bounded_cache(model, held, capfd, count):
    """As README has it for --stream; and a batch too."""
    prompts = ["abc, ab. " * 8, "ab"][:count]
    loaded, tokenizer = sepjax.load(model.removeprefix("--model="))
    attention = dataclasses.replace(loaded.attention, num_sinks=1, max_separators=4, window_size=6, cache_size=20)
    settings = {"max_new_tokens": 4, "attention": attention, "bounded": True}
    if count > 1:
        expected = [(x.text, x.cache) for x in sepjax.generate(loaded, tokenizer, prompts, **settings)]
    else:  # with the programs of the command
        events = list(sepjax.stream(loaded, tokenizer, prompts[0], **settings))
        expected = [("".join(event.text for event in events), events[-1].cache)]
    text, cache = expected[0]
    assert cache.held <= 20 < cache.seen
    arm = [ARM, "--max_new_tokens=4"]
    if count > 1:
        ended = command(capfd, "generate", model, *(f"--prompt={prompt}" for prompt in prompts), *arm)
        assert ended.out == "".join(f">>> {p}\n{x}\n\n" for p, (x, _) in zip(prompts, expected, strict=True)), ended.err
    del loaded
    alone = command(capfd, "generate", model, f"--prompt={prompts[0]}", *arm)
    assert alone.out == text + "\n", alone.err
    assert f"cache holds {cache.held} of {cache.seen} tokens" in alone.err
    assert held == [0] * count, "the weights are there once while it answers"


def test_answers_of_one_file_are_of_one_model_to_the_last_matrix():
    """Also of one that an adapter, or a step of training, has changed in a single matrix."""
    many = Many([[5]], [False], conversation_of(tiny_tokenizer(), None))
    params = {"norm": np.ones(4, np.float32), "kernel": np.zeros((600, 600), np.float32)}

    def asked(params):
        prepared = types.SimpleNamespace(params=params, config=SHAPE)
        engine = types.SimpleNamespace(prepared=prepared, attention=ATTENTION, kept=ATTENTION)
        return inspect.unwrap(asked_of)(engine, many, {"sampling": sepjax.Sampling.create()})

    other = params["kernel"].copy()
    other[599, 3] = 1e-3
    assert asked(params) == asked({"norm": params["norm"], "kernel": params["kernel"].copy()})
    assert asked(params)["model"] != asked(params | {"kernel": other})["model"]
    moved = np.roll(other, 1, axis=1)
    assert asked(params | {"kernel": other})["model"] != asked(params | {"kernel": moved})["model"]
