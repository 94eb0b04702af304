"""Chat templates: where they are found, what they write, and what the sandbox keeps them from."""

import json

import pytest

from sepjax.hub.chat_template import ChatTemplate
from sepjax.hub.errors import HubError

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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "cannot be read"),
        ("{{ raise_exception('no system turn') }}", "fails: no system turn"),
        ("{{ messages.__class__.__mro__ }}", "fails: .*unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "fails: .*unsafe|fails: .*undefined"),
        ("{{ messages.append(1) }}", "fails: .*unsafe|fails: .*not safely callable"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ 1 // 0 }}", "fails"),
        ("x" * 1_000_001, "1000001 characters"),
    ],
)
def test_what_a_template_must_not_do(source, message):
    with pytest.raises(HubError, match=message):
        ChatTemplate(source).render(MESSAGES)
