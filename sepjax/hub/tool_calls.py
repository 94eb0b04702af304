"""Tools in chat templates: what of them a template writes, and calls found in what a model says.

Many models write a call as JSON between two tags (Hermes, Qwen 2.5 and 3, SmolLM2), some all calls as one list:

    I look it up. <tool_call>
    {"name": "weather", "arguments": {"city": "Ulm"}}
    </tool_call>

What stands between the tags and is no such JSON stays text.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sepjax.config import ConfigError
from sepjax.hub.chat_template import ChatTemplate
from sepjax.hub.errors import HubError

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MOST = 100_000  # characters of one call: what is longer is text
_WORD = "probeword"  # that no template has


class Call(NamedTuple):
    """Of a function."""

    name: str
    arguments: str  # a JSON object


class CallFinder:
    """Calls in one answer, whose text comes in pieces."""

    def __init__(self) -> None:
        self._held = ""  # what may belong to a call
        self._is_behind_call = False  # and nothing but white space came since

    def take(self, text: str, *, ends: bool) -> tuple[str, list[Call]]:
        """What is certain by now: text without calls, and the calls. `ends`: whether the answer ends with this piece.

        White space around calls is left out.
        """
        held, said, calls = self._held + text, "", []
        held = held.lstrip() if self._is_behind_call else held
        self._is_behind_call = self._is_behind_call and not held
        while (start := held.find(_OPEN)) >= 0:
            end = held.find(_CLOSE, start)
            if end < 0 and not ends and len(held) - start <= _MOST:
                break
            after = len(held) if end < 0 else end + len(_CLOSE)
            found = calls_of(held[start + len(_OPEN) : after if end < 0 else end])
            said += held[:start].rstrip() if found else held[:after]
            held, calls = held[after:].lstrip() if found else held[after:], calls + found
            self._is_behind_call = bool(found) and not held
        cut = len(held) if ends else _certain(held, start)
        self._held = held[cut:]
        return said + held[:cut], calls


def _certain(text: str, start: int) -> int:
    """Characters in front of a tag at `start` (-1: none), or what may become one; with the white space before it."""
    if start < 0:
        sizes = range(min(len(_OPEN) - 1, len(text)), 0, -1)
        start = len(text) - next((n for n in sizes if text.endswith(_OPEN[:n])), 0)
    return len(text[:start].rstrip())


def calls_of(text: str) -> list[Call]:
    """The calls that the text between two tags is; none, where it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    each = found if isinstance(found, list) else [found]
    if not all(isinstance(x, dict) and isinstance(x.get("name"), str) and x["name"] for x in each):
        return []
    arguments = [x.get("arguments", x.get("parameters", {})) for x in each]
    if not all(isinstance(x, dict) for x in arguments):
        return []
    try:
        # Escaped, where they have halves of surrogate pairs: those are JSON, and no UTF-8. NaN is no JSON.
        return [
            Call(x["name"].encode().decode(), json.dumps(a, ensure_ascii=not _is_utf8(a), allow_nan=False))
            for x, a in zip(each, arguments, strict=True)
        ]
    except ValueError:
        return []


def _is_utf8(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class Written(NamedTuple):
    """What of tools a template writes."""

    tools: bool  # that the model may call
    calls: bool  # of an assistant's message
    results: bool  # messages of the role "tool"
    tagged: bool  # whether calls are written as `CallFinder` finds them


def written(template: ChatTemplate) -> Written:
    """Tried out, once a template. What refuses to be tried counts as written: it refuses a request by itself."""
    return _written(template.key)


def check_written(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> None:  # fmt: skip
    """Raises ConfigError where a conversation has something of tools that the template leaves out."""
    has_calls = any(message.get("tool_calls") for message in messages)
    has_results = any(message["role"] == "tool" for message in messages)
    if not (tools or has_calls or has_results):  # nothing is tried out
        return
    does = written(template)
    for given, is_written, name in (
        (tools, does.tools, "'tools'"),
        (has_calls, does.calls, "'tool_calls'"),
        (has_results, does.results, "messages of the role 'tool'"),
    ):
        if given and not is_written:
            raise ConfigError(f"the model's chat template leaves {name} out; say in a message what they are")


@functools.lru_cache(maxsize=16)
def _written(key: str) -> Written:
    template, user = ChatTemplate.of_key(key), {"role": "user", "content": "-"}
    function = {"name": _WORD, "description": "-", "parameters": {"type": "object", "properties": {}, "required": []}}
    asked = _tried(template.with_variables({"tools": [{"type": "function", "function": function}]}), [user])
    call = {"id": "call00001", "type": "function", "function": {"name": _WORD, "arguments": {}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    answered = {"role": "tool", "content": f"{_WORD}2", "name": "f", "tool_call_id": "call00001"}
    told = _tried(template, [user, called, answered])
    if told is None:
        return Written(asked is None or _WORD in asked, True, True, False)
    spans = re.findall(f"{_OPEN}(.*?){_CLOSE}", told, re.DOTALL)
    tagged = any(call.name == _WORD for span in spans for call in calls_of(span))
    names = told.replace(f"{_WORD}2", "")
    return Written(asked is None or _WORD in asked, _WORD in names, f"{_WORD}2" in told, tagged)


def _tried(template: ChatTemplate, messages: list[Mapping[str, Any]]) -> str | None:
    """What it writes; None: it refuses that."""
    try:
        return template.render(messages)
    except HubError:
        return None
