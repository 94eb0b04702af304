"""Calls in what a model says, however it comes, and what templates write of tools."""

import json
import random

import pytest

from sepjax.hub.chat_template import ChatTemplate
from sepjax.hub.tool_calls import CallFinder, Written, written

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ülm"}}\n</tool_call>'
LISTED = '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "parameters": {"a": 1}}]</tool_call>'
QWEN = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def heard(text, cuts):
    """(text, calls) of an answer that comes in pieces."""
    finder, said, calls, ends = CallFinder(), "", [], [*cuts, len(text)]
    for start, end in zip([0, *cuts], ends, strict=True):
        more, found = finder.take(text[start:end], ends=end == len(text))
        said, calls = said + more, calls + found
    return said, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("plain <b>text</b>, a < b", "plain <b>text</b>, a < b", []),
        (f"I look.\n{CALL}", "I look.", [("weather", {"city": "Ülm"})]),
        (f"{CALL}\n{CALL}\n", "", [("weather", {"city": "Ülm"})] * 2),
        (f" {LISTED} Done.", "Done.", [("f", {}), ("g", {"a": 1})]),
        (f"{CALL[:-12]}", "", [("weather", {"city": "Ülm"})]),  # an end token came in place of the tag
        ("so <tool_call>no JSON</tool_call> then <tool", "so <tool_call>no JSON</tool_call> then <tool", []),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ("ends with blanks \n ", "ends with blanks \n ", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text, said, calls):
    rng = random.Random(len(text))
    for cuts in ([], range(1, len(text)), sorted(rng.sample(range(1, len(text)), min(5, len(text) - 1)))):
        assert heard(text, cuts) == (said, calls)


@pytest.mark.parametrize("value", ["NaN", "1e999", "[-Infinity]"])
def test_what_no_client_could_read_is_no_call(value):
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": {value}}}}}</tool_call>'
    assert heard(text, []) == (text, [])


def test_halves_of_surrogate_pairs_are_sent_as_json_escapes():
    told = r'{"name": "f", "arguments": {"a": "Ü\ud800"}}'
    _, (call,) = CallFinder().take(f"<tool_call>{told}</tool_call>", ends=True)
    assert json.loads(call.arguments.encode()) == {"a": "Ü\ud800"}
    named = r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>'
    assert heard(named, []) == (named, [])


def test_what_never_ends_is_no_call():
    finder = CallFinder()
    assert finder.take("<tool_call>", ends=False) == ("", [])
    assert len(finder.take("a" * 100_000, ends=False)[0]) > 100_000


def test_what_a_template_writes_of_tools_is_tried_out():
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    assert written(ChatTemplate(QWEN)) == Written(tools=True, calls=True, results=True, tagged=True)
    assert written(ChatTemplate(plain)) == Written(tools=False, calls=False, results=True, tagged=False)
    assert written(ChatTemplate(strict)) == Written(tools=False, calls=True, results=True, tagged=False)
