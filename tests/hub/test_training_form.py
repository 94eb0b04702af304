"""Conversations of JSON lines: what is scored, how they are packed and resumed, what is refused."""

import dataclasses
import gzip
import json
import logging
import os
import subprocess

import numpy as np
import pytest

from sepjax.begin import conversation_form
from sepjax.bench.data import measure
from sepjax.config import Config, ConfigError, DataConfig, ModelConfig, TrainingConfig, validate
from sepjax.data import reader
from sepjax.data.conversations import RecordError, messages_of, tools_of
from sepjax.data.errors import DataError
from sepjax.data.packing import TokenStream, WholeRows, fitting
from sepjax.data.pipeline import evaluation_batches, training_batches
from sepjax.data.scored import marked, unmarked
from sepjax.data.sources import text_source
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation import inputs
from sepjax.evaluation.documents import StreamError, read_texts
from sepjax.evaluation.inputs import texts_of
from sepjax.evaluation.perplexity import TextError, token_windows
from sepjax.hub.chat_template import ChatTemplate
from sepjax.hub.training_form import training_form
from tests.hub import tiny
from tests.hub.conftest import tokenizer_json
from tests.hub.test_tool_calls import QWEN

pytest.importorskip("jinja2")
TORCH = os.environ.get("SEPJAX_TORCH_PYTHON")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3 has it: BOS, headers, an end of a turn without a newline.
LLAMA = (
    "{% for m in messages %}{% if loop.first %}{{ '<|endoftext|>' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '!\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant!\n\n' }}{% endif %}"
)
# One that says itself what is an answer: here with the newline behind it.
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One that takes thoughts out of earlier turns, so that these are written otherwise once others follow.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ 'hmm, ' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who ran?"},
    {"role": "assistant", "content": "The ant."},
    {"role": "user", "content": "An ant! "},
    {"role": "assistant", "content": " It was"},
]


def write_tokenizer(folder, template, size=66, **changes):
    """A byte-level tokenizer with ChatML's control tokens and a chat template; `changes` are of tokenizer.json."""
    folder.mkdir(exist_ok=True)
    file = json.loads(tokenizer_json())
    model, named = file["model"], {"<|im_start|>": size - 2, "<|im_end|>": size - 1}
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < size - 2}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file["added_tokens"] += [{**file["added_tokens"][0], "id": i, "content": name} for name, i in named.items()]
    (folder / "tokenizer.json").write_text(json.dumps(file | changes))
    config = {"chat_template": template, "eos_token": "<|im_end|>", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer", CHATML)


def config_of(path, tokenizer, **data):
    settings = {"name": str(path), "tokenizer_vocab_size": 66, "sequence_length": 64, "batch_size": 4} | data
    return Config(model=ModelConfig(vocab_size=tokenizer.vocab_size), data=DataConfig(**settings))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def scored_text(tokenizer, text):
    """What of a marked text is scored, pieces of consecutive targets."""
    stream = TokenStream.encode(tokenizer, [text], conversations=True)
    assert [int(stream.tokens[0]), *stream.targets.tolist()] == tokenizer.encode(unmarked(text)[0])
    pieces = np.split(stream.targets, np.flatnonzero(np.diff(stream.scored.astype(int))) + 1)
    return [names(tokenizer, piece) for piece in pieces][0 if stream.scored[0] else 1 :: 2]


def names(tokenizer, ids):
    control = {tokenizer.control_id(name): name for name in tokenizer.control_tokens()}
    return "".join(control.get(int(i)) or tokenizer.token_bytes(int(i)).decode() for i in ids)


@pytest.mark.parametrize(
    ("template", "train_on", "expected"),
    [
        (CHATML, "assistant", ["The ant.<|im_end|>", " It was<|im_end|>"]),
        (CHATML, "last", [" It was<|im_end|>"]),
        (LLAMA, "assistant", ["The ant.<|im_end|>", "It was<|im_end|>"]),
        (GENERATION, "assistant", ["The ant.<|im_end|>\n", " It was<|im_end|>\n"]),
        (FORGETFUL, "last", ["hmm,  It was<|im_end|>"]),
    ],
    ids=["ChatML", "ChatML, last", "Llama 3", "generation", "forgetful, last"],
)
def test_an_assistants_words_and_their_end_are_scored(tmp_path, template, train_on, expected):
    tokenizer = write_tokenizer(tmp_path / "t", template)
    text = training_form(DataConfig(train_on=train_on), tokenizer)(TURNS)
    assert scored_text(tokenizer, text) == expected
    assert unmarked(text)[0] == ChatTemplate(template).render(TURNS, add_generation_prompt=False)


def test_all_is_scored_where_asked_and_marks_are_undone(tokenizer):
    text = training_form(DataConfig(train_on="all"), tokenizer)(TURNS)
    assert TokenStream.encode(tokenizer, [text], conversations=True).scored.all()
    assert unmarked(marked("abcdef", [(0, 2), (2, 3), (5, 6)])) == ("abcdef", [(0, 2), (2, 3), (5, 6)])


def test_a_tokenizer_that_changes_what_it_reads_says_where(tmp_path):
    """Lower case is as long; what a normalizer takes away is not, and offsets tell."""
    replace = {"type": "Replace", "pattern": {"String": "nt"}, "content": "n"}
    tokenizer = write_tokenizer(tmp_path / "t", CHATML, normalizer=replace)
    text = training_form(DataConfig(), tokenizer)(TURNS)
    stream = TokenStream.encode(tokenizer, [text], conversations=True)
    assert names(tokenizer, stream.targets[stream.scored]) == "The an.<|im_end|> It was<|im_end|>"


@pytest.mark.skipif(TORCH is None, reason="needs transformers in SEPJAX_TORCH_PYTHON")
def test_the_mask_is_that_of_transformers(tmp_path):
    """`return_assistant_tokens_mask`, of templates that mark answers; tokens shifted by one, as targets are."""
    tokenizer = write_tokenizer(tmp_path / "t", GENERATION)
    script = (
        "import json, sys; from transformers import PreTrainedTokenizerFast as T\n"
        "t = T(tokenizer_file=sys.argv[1] + '/tokenizer.json', eos_token='<|im_end|>')\n"
        "x = t.apply_chat_template(json.loads(sys.argv[2]), chat_template=sys.argv[3], tokenize=True, return_dict=True,"
        " return_assistant_tokens_mask=True)\n"
        "print(json.dumps([x['input_ids'], x['assistant_masks']]))"
    )
    command = [TORCH, "-c", script, str(tmp_path / "t"), json.dumps(TURNS), GENERATION]
    ids, mask = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    stream = TokenStream.encode(tokenizer, [training_form(DataConfig(), tokenizer)(TURNS)], conversations=True)
    assert stream.targets.tolist() == ids[1:]
    assert stream.scored.astype(int).tolist() == mask[1:]
    assert sum(mask) > 10


def test_calls_are_learned_and_what_they_gave_is_not(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "t", QWEN)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    turns = [
        {"role": "user", "content": "Who ran?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "an ant", "tool_call_id": "1"},
        {"role": "assistant", "content": "An ant."},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "who <|im_end|>"}}]
    record = {"messages": turns, "tools": json.dumps(tools)}
    called = '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
    for train_on, scored in (
        ("assistant", [f"{called}<|im_end|>", "An ant.<|im_end|>"]),
        ("last", ["An ant.<|im_end|>"]),
    ):
        form = training_form(DataConfig(train_on=train_on), tokenizer)
        text, spans = unmarked(form(messages_of(record, answers=True), tools_of(record)))
        assert [text[first:last] for first, last in spans] == scored
    assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "f"')
    assert "<|im_start|>tool\nan ant<|im_end|>" in text
    with pytest.raises(RecordError, match="'tools' has U\\+FDD2"):
        tools_of({"tools": [{"name": "\ufdd2"}]})


def test_notes_and_empty_fields_change_nothing():
    record = {"messages": [{**turn, "tool_calls": None, "name": "x"} for turn in TURNS], "id": 3, "tools": []}
    record["messages"][2]["tool_calls"] = []
    assert messages_of(record, answers=True) == [{**turn, "name": "x"} for turn in TURNS]


def conversations(count, seed=0):
    rng = np.random.default_rng(seed)
    words = ["the ant", "in and out", "who ran", "an ant", "then"]
    return [
        {"prompt": " ".join(rng.choice(words, rng.integers(1, 3))), "completion": str(rng.choice(words)) + f". {i}"}
        for i in range(count)
    ]


def test_conversations_stay_whole_and_a_run_resumes(tokenizer, tmp_path, monkeypatch):
    """Every conversation of an epoch is in one piece, once; a restored iterator gives the same batches."""
    monkeypatch.setattr(reader, "_BLOCK_BATCHES", 3)
    path = write(tmp_path / "data.jsonl", conversations(60))
    config = config_of(path, tokenizer, sequence_length=200)
    form = conversation_form(config, tokenizer)
    here = {"seed": 3, "form": form}
    batches = training_batches(config, tokenizer, str(tmp_path / "prepared"), **here)
    first = next(batches)
    state = batches.get_state()
    rest = [next(batches) for _ in range(11)]
    again = training_batches(config, tokenizer, str(tmp_path / "prepared"), **here)
    again.set_state(state)
    for batch in rest:
        for name, x in vars(next(again)).items():
            np.testing.assert_array_equal(x, getattr(batch, name))
    documents = {
        tuple(tokenizer.encode(unmarked(text)[0]))
        for text in text_source(config.data, str(tmp_path / "prepared"), "train", form)
    }
    assert 50 <= len(documents) < 60
    found = []
    for batch in [first, *rest]:
        for tokens, targets, segments, positions in zip(
            batch.tokens, batch.targets, batch.segment_ids, batch.positions, strict=True
        ):
            for segment in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == segment)
                assert positions[at].tolist() == list(range(len(at)))
                found.append((*tokens[at].tolist(), int(targets[at][-1])))
    assert set(found) == documents
    padding = np.mean([batch.segment_ids == 0 for batch in [first, *rest]])
    assert 0 < padding < 0.2

    held_out = list(evaluation_batches(config, tokenizer, str(tmp_path / "prepared"), form=form))
    assert len(held_out) == 1
    assert 0 < held_out[0].loss_mask.sum() < (held_out[0].segment_ids > 0).sum()


def test_the_bench_reads_conversations_as_training_does(tmp_path):
    write(tmp_path / "data.jsonl", conversations(40))
    model = tmp_path / "model"
    golden = tiny.golden()["llama-bias"]
    tiny.write_checkpoint(model, golden["config"] | {"torch_dtype": "float32"}, golden["shapes"])
    write_tokenizer(model, CHATML, size=64)
    config = Config(
        data=DataConfig(name=str(tmp_path / "data.jsonl"), sequence_length=100, batch_size=4),
        training=TrainingConfig(init_from=str(model)),
    )
    assert measure(config, str(tmp_path / "bench"), seconds=0.01)["tokens_per_second"] > 0


def test_rows_are_filled_first_fit():
    def stream(*sizes):
        parts = [
            (np.full(n, i + 1, np.int32), np.full(n, i), np.arange(n, dtype=np.int32)) for i, n in enumerate(sizes)
        ]
        tokens, documents, offsets = (np.concatenate(x) for x in zip(*parts, strict=True))
        return TokenStream(tokens, tokens, documents, offsets, np.ones(len(tokens), bool))

    rows = WholeRows(2, 6)
    assert rows.add(stream(4, 3, 2, 4)).start() == (3, 0)
    assert rows.free == 3
    batch = rows.batch(lambda tokens, positions: tokens == 2)
    assert batch.tokens.tolist() == [[1, 1, 1, 1, 3, 3], [2, 2, 2, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    for skip, tokens in ((False, [1, 1, 1, 2, 2, 3, 3, 3]), (True, [2, 2])):
        cut, number = fitting(stream(5, 2, 4), 3, skip=skip)
        assert (cut.tokens.tolist(), number) == (tokens, 2)


def test_what_is_too_long_is_counted_and_told(tokenizer, tmp_path, caplog):
    long = {"prompt": "who ran" * 20, "completion": "the ant"}
    path = write(tmp_path / "data.jsonl", [long, *conversations(20)])
    config = config_of(path, tokenizer, train_split="all", too_long="skip")
    data = dataclasses.replace(config.data, train_split="train[:100%]")
    config = dataclasses.replace(config, data=data)
    with caplog.at_level(logging.WARNING):
        batches = training_batches(
            config, tokenizer, str(tmp_path / "prepared"), seed=0, form=conversation_form(config, tokenizer)
        )
        assert all(b.segment_ids.any() for b in (next(batches) for _ in range(2)))
    assert "more than data.sequence_length=64 tokens and were left out (data.too_long)" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', r":2: it is not JSON"),
        ('{"prompt": "a", "prompt": "b"}', r":2: it is not JSON: 'prompt' is there twice in one object"),
        ("[1]", r":2: it is '\[1\]', expected a JSON object"),
        ('{"messages": []}', r":2: 'messages' is '\[\]', expected a list of messages"),
        ('{"messages": [{"role": "user"}]}', r":2: messages\[0\] has no 'content'"),
        (
            '{"messages": [{"role": "bot", "content": "a"}]}',
            r":2: messages\[0\] has the role 'bot', expected one of system",
        ),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', r":2: 'messages\[0\].content' is .*, expected a text"),
        ('{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}', r":2: the model's .* leaves 'tools' out"),
        ('{"prompt": "a", "completion": "b", "tools": "f"}', r":2: 'tools' is 'f', expected a list of objects"),
        (
            '{"prompt": "a", "completion": "b", "chat_template_kwargs": {"x": 1}}',
            r":2: 'chat_template_kwargs' is not read",
        ),
        (
            '{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]}',
            r":2: messages\[0\].tool_calls\[0\] is \"{'id': '1'}\", expected an object with 'function'",
        ),
        (
            '{"messages": [{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]}',
            r":2: messages\[0\] has 'tool_calls', which an assistant's message has, and this is 'user'",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}]}',
            r":2: messages\[0\].tool_calls\[0\].function.arguments is '1', expected an object",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}',
            r":2: the model's chat template leaves 'tool_calls' out",
        ),
        (
            '{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}',
            r":2: messages\[0\] has null for 'content', expected a text, or 'tool_calls'",
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', r":2: no message is an assistant's"),
        ('{"prompt": 1, "completion": "a"}', r":2: 'prompt' is '1', expected a text or a list of messages"),
        ('{"text": "a"}', r":2: it has neither 'messages' nor 'prompt' with 'completion', as records before it have"),
        ('{"prompt": "\\ud800", "completion": "a"}', r":2: 'prompt' has half of a surrogate pair at character 0"),
    ],
)
def test_bad_records_are_named_and_bounded(tokenizer, tmp_path, line, message, caplog):
    good = [json.dumps(record) for record in conversations(12)]
    (tmp_path / "data.jsonl").write_text("\n".join([good[0], line, "", *good[1:]]) + "\n")
    config = config_of(tmp_path / "data.jsonl", tokenizer)
    form = conversation_form(config, tokenizer)
    with pytest.raises(DataError, match=r"data\.jsonl" + message):
        text_source(config.data, str(tmp_path / "prepared"), "train", form)
    data = dataclasses.replace(config.data, max_bad_documents=1)
    source = text_source(data, str(tmp_path / "prepared"), "train", form)
    held_out = text_source(data, str(tmp_path / "prepared"), "validation", form)
    assert len(source) + len(held_out) == 12
    assert "a record is left out, 1 of at most 1" in caplog.text
    with pytest.raises(DataError, match=r"data\.jsonl" + message):  # what is prepared by now is not for this run
        text_source(config.data, str(tmp_path / "prepared"), "train", form)


def test_templates_that_cannot_tell_are_refused(tmp_path):
    record = {"messages": TURNS}
    path = write(tmp_path / "data.jsonl", [record])
    tokenizer = write_tokenizer(tmp_path / "t", FORGETFUL)
    config = config_of(path, tokenizer)
    match = r"data\.jsonl:1: the chat template fails: messages\[:3\] are written otherwise .*data\.train_on='last'"
    with pytest.raises(DataError, match=match):
        text_source(config.data, str(tmp_path / "p"), "all", conversation_form(config, tokenizer))
    greeted = training_form(DataConfig(), write_tokenizer(tmp_path / "first", "{{ messages[0].role }}" + CHATML))
    match = r"messages\[0\] is an assistant's, and the template cannot write a prompt before it; .*train_on='last'"
    with pytest.raises(DataError, match=match):
        greeted(TURNS[2:])
    assert unmarked(dataclasses.replace(greeted, train_on="last")(TURNS[2:]))[1]
    plain = write_tokenizer(tmp_path / "plain", "")
    with pytest.raises(DataError, match="has conversations, but the model's tokenizer has no chat template"):
        text_source(config.data, str(tmp_path / "p"), "train", conversation_form(config, plain))
    with pytest.raises(DataError, match="has conversations, but the model's tokenizer has no chat template"):
        texts_of(tmp_path, config, plain, str(path), "all", 0)
    with pytest.raises(ConfigError, match=r"whole texts are streamed .* `sepjax evaluate windows` scores the answers"):
        inputs._sources(config.data, str(tmp_path / "p"), None, "all")
    data = dataclasses.replace(config.data, loss_on="a")
    chatml = write_tokenizer(tmp_path / "chatml", CHATML)
    write(path, [{"messages": TURNS}, *conversations(3)])
    with pytest.raises(DataError, match=r"data\.loss_on='a' with conversations, of which data\.train_on='assistant'"):
        text_source(data, str(tmp_path / "p"), "train", conversation_form(config, chatml))
    for name, value in (("train_on", "user"), ("too_long", "cut")):
        with pytest.raises(ConfigError, match=rf"data\.{name}='{value}' is not one of"):
            validate(dataclasses.replace(config, data=dataclasses.replace(config.data, **{name: value})))


def test_without_text_the_working_folder_is_not_searched(tmp_path, monkeypatch):
    searched = []
    monkeypatch.setattr(inputs, "has_records", searched.append)
    found = [inputs.Texts("", 1.0, ["a"])]
    monkeypatch.setattr(
        inputs, "_sources", lambda data, folder, tokenizer, split: found if split == "validation" else 0
    )
    assert texts_of(tmp_path, Config(), None, "", "", 0) == found
    assert not searched


def test_evaluation_scores_the_tokens_that_training_does(tmp_path, tokenizer):
    path = write(tmp_path / "data.jsonl", [{"messages": TURNS}, *conversations(3)])
    config = config_of(path, tokenizer)
    (texts,) = (x.documents for x in texts_of(tmp_path, config, tokenizer, str(path), "", 0))
    windows = token_windows(tokenizer, texts, 16)
    whole = TokenStream.encode(tokenizer, texts, conversations=True)
    assert sum(int(x.sum()) for x in windows.scored) == int(whole.scored.sum())
    assert windows.of_scored([ids[1:] for ids in windows.ids]).tolist() == whole.targets[whole.scored].tolist()
    assert all(x.any() for x in windows.scored)
    assert windows.num_bytes == sum(len(tokenizer.token_bytes(int(i))) for i in whole.targets[whole.scored])
    with pytest.raises(TextError, match="or no assistant says anything"):
        token_windows(tokenizer, texts, 16, max_tokens=2)


def test_records_of_texts_are_documents(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.jsonl", [{"body": f"text {i}"} for i in range(30)])
    with gzip.open(folder / "b.jsonl.gz", "wb") as file:
        file.write(json.dumps({"body": "packed"}).encode())
    data = DataConfig(name=str(folder), text_key="body")
    source = text_source(data, str(tmp_path / "p"), "train")
    held_out = text_source(data, str(tmp_path / "p"), "validation")
    assert sorted([*source, *held_out]) == sorted([*(f"text {i}" for i in range(30)), "packed"])
    assert not source.conversations
    assert sorted(text_source(data, str(tmp_path / "p"), "all")) == sorted([*source, *held_out])
    for name, value in (("train_on", "last"), ("too_long", "skip")):
        with pytest.raises(
            DataError, match=rf"data\.{name}='{value}' does nothing for .*texts', which has no conversations"
        ):
            text_source(dataclasses.replace(data, **{name: value}), str(tmp_path / "p"), "train")
    other = Config(data=DataConfig(text_key="body", train_on="last"))
    (texts,) = (x.documents for x in texts_of(tmp_path, other, None, str(folder / "a.jsonl"), "", 3))
    assert len(texts) == 3
    assert set(texts) < {f"text {i}" for i in range(30)}
    with pytest.raises(
        StreamError, match=r"a\.jsonl' has JSON lines or Parquet.* reads those, and nothing else here does; give"
    ):
        read_texts(folder / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl:1: it has the fields 'body', expected 'messages', .*or 'text'"):
        text_source(DataConfig(name=str(folder)), str(tmp_path / "p"), "train")
    (folder / "c.jsonl.bz2").write_bytes(b"")
    with pytest.raises(DataError, match="packed in a way that is not read"):
        text_source(data, str(tmp_path / "p"), "train")
