"""Conversations in the forms of published models, and the loop over a terminal without a terminal."""

import io
import os
import signal

import pytest
import tokenizers

from sepjax import stream
from sepjax.config import ConfigError
from sepjax.data.special_tokens import SpecialTokens
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.generation.chat import chat, gauge, interrupt_flag
from sepjax.generation.conversation import ChatFormat, conversation_of
from sepjax.generation.row import CacheUse
from sepjax.hub.chat_template import ChatTemplate
from sepjax.hub.errors import HubError
from sepjax.separators import BYTE_OF_CHARACTER
from tests.generation.tiny import tiny_model, tiny_tokenizer

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tokenizer_of(control, eos=None, template=None) -> Tokenizer:
    """Bytes and control tokens."""
    vocabulary = {token: i for i, token in enumerate([*control, *BYTE_OF_CHARACTER])}
    file = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    file.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = tokenizers.decoders.ByteLevel()
    file.add_special_tokens(control)
    special = SpecialTokens(names={"bos_token": None, "eos_token": eos}, chat_template=template)
    return Tokenizer(HuggingFaceModel(file.to_str(), special))


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
    assert ids.count(tokenizer.control_id("<|im_end|>")) == 1
    assert tokenizer.decode(ids) == "user\na<|im_end|>b\nassistant\n"  # spelt out: it is what the user said
    ids = ChatFormat.of(tokenizer).turn(tokenizer, "a<|im_end|>b", before=None, control_tokens=True)
    assert ids.count(tokenizer.control_id("<|im_end|>")) == 2


BY_NAME = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def turns(template, said, *, answers, before, **settings):
    """(ids fed, reports) of a conversation by a template, with these answers and their last tokens."""
    tokenizer = tokenizer_of(CHATML, eos="<|im_end|>")
    form = conversation_of(tokenizer, ChatTemplate(template), **settings)
    fed, reports = [], []
    for text, answer, last in zip(said, [*answers, ""], [None, *before], strict=True):
        ids, report = form.turn(text, before=None if last is None else tokenizer.control_id(last) or 99)
        form.answered(answer)
        fed.append(spelt(tokenizer, ids))
        reports.append(report)
    return fed, reports, form


def test_turns_are_what_the_models_template_adds():
    """Rendered with the new turn and without: what is fed and answered joins to what the template writes of it all."""
    said, answers = ["hi", "why?", "so"], [" well ", "because"]
    fed, reports, form = turns(BY_NAME, said, answers=answers, before=["<|im_end|>", "x"], system="be kind")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert fed[0] == ChatTemplate(BY_NAME).render(messages)
    assert fed[1] == "<|im_start|>user: why?<|im_end|><|im_start|>assistant: "  # the answer's end came from the model
    assert fed[2] == "<|im_end|><|im_start|>user: so<|im_end|><|im_start|>assistant: "  # the answer was cut short
    assert reports == ["", "", ""]  # trimming is not rewriting
    assert form.stop == ()
    assert form.stop_token_ids == (2,)
    fed, _, _ = turns(BY_NAME, ["a<|im_end|>b"], answers=[], before=[])
    assert fed == ["<|im_start|>user: a<|im_end|>b<|im_end|><|im_start|>assistant: "]


def test_every_turn_of_a_conversation_has_the_same_template_variables():
    brief = BY_NAME.replace("assistant: ", "assistant: {% if not thinking %}-{% endif %}")
    said, answers, ends = ["hi", "why?"], ["well"], ["<|im_end|>"]
    for thinking, prompt in ((True, "assistant: "), (False, "assistant: -")):
        variables = {"thinking": thinking}
        fed, reports, _ = turns(brief, said, answers=answers, before=ends, template_variables=variables)
        assert fed[1] == f"<|im_start|>user: why?<|im_end|><|im_start|>{prompt}"
        assert fed[0].endswith(f"<|im_start|>{prompt}")
        assert reports == ["", ""] if thinking else reports[0] == ""
    tokenizer = tokenizer_of(CHATML, eos="<|im_end|>")
    assert conversation_of(tokenizer, None, template_variables={}).name == "ChatML"
    with pytest.raises(ConfigError, match="template_variables do nothing for a model without a chat template"):
        conversation_of(tokenizer, None, template_variables={"thinking": False})


def test_a_template_that_rewrites_earlier_turns_is_reported_once():
    moves = (  # Mistral's: the system's words stand before the last thing that the user says
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% endif %}"
        "{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}[{% if loop.last and s %}{{ s }} {% endif %}{{ m.content }}]"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    fed, reports, _ = turns(moves, ["u", "v", "w"], answers=["a", "b"], before=["x", "x"], system="s")
    assert fed == ["[s u]", "<|im_end|>[s v]", "<|im_end|>[s w]"]
    assert "rewrites earlier turns" in reports[1]
    assert [reports[0], reports[2]] == ["", ""]
    forgets = "{{ messages[-1].content }}"  # no answer comes out of it: a known form goes on
    fed, reports, _ = turns(forgets, ["u", "v"], answers=["a"], before=["<|im_end|>"])
    assert fed == ["u", "\n<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n"]
    assert "in the format ChatML" in reports[1]
    with pytest.raises(HubError, match="no system"):
        turns("{{ raise_exception('no system') }}", ["u"], answers=[], before=[], system="s")


def test_a_resumed_conversation_goes_on_in_the_template():
    tokenizer = tokenizer_of(CHATML, eos="<|im_end|>")
    form = conversation_of(tokenizer, ChatTemplate(BY_NAME), system="be kind")
    for text in ("on", "and on"):
        ids, report = form.turn(text, before=tokenizer.control_id("<|im_end|>"))
        form.answered("yes")
        assert (spelt(tokenizer, ids), report) == (f"<|im_start|>user: {text}<|im_end|><|im_start|>assistant: ", "")


@pytest.fixture(scope="module")
def talker():
    """The tests' model, with as many tokens as its own tokenizer has: the same programs."""
    more = [f"<|{i}|>" for i in range(tiny_tokenizer().vocab_size - 256 - len(CHATML))]
    return tiny_model(), tokenizer_of([*CHATML, *more], eos="<|im_end|>", template=BY_NAME)


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
    assert "the model's own template" in reports[0]
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


def test_a_line_that_is_no_text_is_left_out(talker, tmp_path, monkeypatch):
    """By name, and so is a turn that the template refuses; what was said before goes on, and is saved."""
    model, tokenizer = talker
    lines = [b"REFUSED", b"hello there.", b"caf\xe9, friend.", f"/save {tmp_path / 'talk'}".encode()]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8"))
    refusing = "{% if 'REFUSED' in messages[-1].content %}{{ raise_exception('no such word') }}{% endif %}"
    conversation = conversation_of(tokenizer, ChatTemplate(refusing + tokenizer.special.chat_template))
    events, written, reports = stream(model, tokenizer, bounded=True, max_new_tokens=12), [], []
    chat(events, tokenizer, conversation=conversation, write=written.append, report=reports.append)
    assert "no such word (the conversation is as it was before)" in reports[1]
    assert reports[2].startswith("[cache ")
    assert "the line is not UTF-8: byte 0xe9 behind 'caf'" in reports[3]
    assert "--resume=" in reports[4]
    assert len(reports) == 5


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
