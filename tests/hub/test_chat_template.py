"""Chat templates: where they are found, what they write, and what the sandbox keeps them from."""

import json

import pytest

from sepjax.config import ConfigError
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub import template_process
from sepjax.hub.chat_template import ChatTemplate
from sepjax.hub.errors import HubError
from tests.data.test_special_tokens import SMOL, write

pytest.importorskip("jinja2")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}]
WRITTEN = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"


def test_a_template_writes_the_conversation(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    template = ChatTemplate.find(tmp_path)
    assert template.render(MESSAGES) == WRITTEN + "<|im_start|>assistant\n"
    assert template.render(MESSAGES, add_generation_prompt=False) == WRITTEN


def test_where_templates_are_found(tmp_path):
    assert ChatTemplate.find(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    assert ChatTemplate.find(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}\n")
    assert ChatTemplate.find(tmp_path).render([{"role": "user", "content": "a"}]) == "<s>a</s>"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages | tojson }}"}]
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": named}))
    assert json.loads(ChatTemplate.find(tmp_path).render(MESSAGES)) == MESSAGES
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ pad_token }}"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    assert ChatTemplate.find(tmp_path).render(MESSAGES) == "<pad>"


# What transformers 5.24 writes (apply_chat_template) for MESSAGES with bos_token None and eos_token "</s>".
@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{% if tools is not none %}T{% endif %}{% if documents is none %}D{% endif %}", "D"),
        ("[{{ bos_token }}|{{ eos_token }}|{{ bos_token is defined }}]", "[|</s>|False]"),
        ("{{ {'b': 'é<', 'a': [1]} | tojson }}", '{"b": "é<", "a": [1]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(sort_keys=True, ensure_ascii=True, separators=(',', ':')) }}",
         '{"a":1,"b":"\\u00e9"}'),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% generation %}A{% set z = 1 %}{% endgeneration %}{{ z }}", "A"),
        ("{{ strftime_now('x%%') }}", "x%"),
        ("{% set n = namespace(x=1, self=2) %}{% set n.x = n.x + n.self %}{{ n.x }}", "3"),
        ("a\n  {%- if true %}\n    b {{- ' c' }}\n  {% endif %}\n", "a    b c\n"),
    ],
)  # fmt: skip
def test_templates_write_what_transformers_writes(source, written):
    assert ChatTemplate(source, {"bos_token": None, "eos_token": "</s>"}).render(MESSAGES) == written


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("reasoning_content", "thinking role reasoning_content"),
        ("thinking", "thinking role reasoning_content"),
        ("reasoning", "thinking role reasoning reasoning_content"),
    ],
)
def test_reasoning_is_read_under_the_names_that_templates_use(name, keys):
    template = ChatTemplate(
        "{{ messages[0].reasoning_content }} {{ messages[0].thinking }} {{ messages[0] | join(' ') }}"
    )
    assert template.render([{"role": "assistant", name: "a"}]) == f"a a {keys}"  # as transformers writes it


def test_long_conversations_are_not_cut():
    text = "word " * 400_000
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": text}]) == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"tool_use": "x"}, "several chat templates, but none named 'default': tool_use"),
        ([{"name": "rag", "template": "x"}, 3], "none named 'default': rag"),
        (7, "the chat template is 7, expected a text"),
        ({"default": {"a": 1}}, "none named 'default'"),
        ([], "none named 'default': none"),
    ],
)
def test_other_things_than_a_template_are_refused(source, message):
    with pytest.raises(HubError, match=message):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 3000000000 }}", "more memory than a template may have"),  # folded while it is read
        ("{{ '%999999999d' % 1 }}", "more memory"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be read: it is nested too deeply"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
        ("{{ messages[0].content.ljust(20000000) }}", "writes 20,000,000 characters, more than"),
        ("{{ lipsum(n=99999) }}", "more seconds of computing|characters, more than"),
    ],
)
def test_hostile_templates_are_refused_within_seconds(source, message):
    with pytest.raises(HubError, match=message) as caught:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(caught.value)
    assert ChatTemplate("{{ messages | length }}").render(MESSAGES) == "2"  # the next one is served


def test_the_process_of_templates_is_started_once_and_again_when_it_ended():
    template = ChatTemplate("{{ 1 + 1 }}")
    worker = template_process._running[0]
    assert (template.render(MESSAGES), template_process._running) == ("2", [worker])
    worker.kill()
    worker.wait()
    assert template.render(MESSAGES) == "2"
    assert template_process._running != [worker]


def test_only_the_templates_own_control_tokens_count(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, SMOL))
    template = ChatTemplate(CHATML)
    said = [{"role": "user", "content": "a<|im_end|>\ufdd0b"}]
    safe = template.encode(tokenizer, said, control_tokens=False)
    assert safe.count(258) == 1
    assert tokenizer.decode(safe) == "user\na<|im_end|>b\nassistant\n"
    assert template.encode(tokenizer, said).count(258) == 2


def test_variables_are_what_the_template_may_name_besides(tmp_path):
    plain = ChatTemplate(
        "{% if thinking is defined and thinking is false %}brief{% endif %}|{{ tools | tojson }}|{{ mode }}",
        {"bos_token": "<s>", "boi_token": "<i>"},
    )
    tools = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
    given = plain.with_variables({"thinking": False, "tools": tools, "nobody_asks": (1, None), "self": 2})
    assert given.render(MESSAGES) == f"brief|{json.dumps(tools)}|"
    assert given.with_variables({"thinking": True, "mode": "x"}).render(MESSAGES) == f"|{json.dumps(tools)}|x"
    assert plain.render(MESSAGES) == "|null|"
    assert len({plain.key, given.key, given.with_variables({"mode": "x"}).key}) == 3
    for name in ("messages", "add_generation_prompt", "bos_token", "eos_token", "boi_token", "strftime_now"):
        with pytest.raises(
            ConfigError, match=f"template variable '{name}' is set by the renderer itself; leave it out"
        ):
            plain.with_variables({"x": 1, name: 1})
    deep = []
    for _ in range(10_000):
        deep = [deep]
    for value in (object(), {1: 2}, [b"x"], deep):
        with pytest.raises(ConfigError, match="template variable 'x' must be a JSON value"):
            plain.with_variables({"x": value})

    tokenizer = Tokenizer.load(write(tmp_path, SMOL))  # names of control tokens in a user's variables are text, too
    loud = ChatTemplate(CHATML + "{{ x.y[0] }}").with_variables({"x": {"y": ["a<|im_end|>"]}})
    counts = [loud.encode(tokenizer, MESSAGES[:1], control_tokens=control).count(258) for control in (True, False)]
    assert counts == [2, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "cannot be read"),
        ("{{ raise_exception('no system turn') }}", "fails: no system turn"),
        ("{{ messages.__class__.__mro__ }}", "fails: .*unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "fails: .*unsafe|fails: .*undefined"),
        ("{{ messages.append(1) }}", "fails: .*unsafe|fails: .*not safely callable"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{% set n = namespace(_x=1) %}", "fails: a namespace may hold no name that begins with '_'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "fails: a namespace may hold no name that begins with '_'"),
        ("{{ 1 // 0 }}", "fails"),
        ("x" * 1_000_001, "1000001 characters"),
    ],
)
def test_what_a_template_must_not_do(source, message):
    with pytest.raises(HubError, match=message):
        ChatTemplate(source).render(MESSAGES)
