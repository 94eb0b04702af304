"""The messages of a chat, and the tools that a model may call, as the model's template reads them.

A conversation with tools:

    user         what is asked
    assistant    tool_calls: names of functions with arguments, beside the content or in its place
    tool         what a function gave; tool_call_id and name say which
"""

import dataclasses
from typing import Any

from sepjax.serve.errors import ApiError
from sepjax.serve.fields import Field, mapping, read, strict_json, text, whole, wrong

_ROLES = ("system", "user", "assistant", "tool")
_MOST_TOOLS = 1024
_REFUSED: dict[str, tuple[Any, ...] | None] = {"refusal": (), "function_call": (), "audio": (), "annotations": ()}


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    reasoning_content: str | None = None
    name: str | None = None  # of who says it
    tool_calls: tuple[dict[str, Any], ...] = ()  # of an assistant; arguments are objects, as templates read them
    tool_call_id: str | None = None  # of a tool: which call it answers

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it; whether they write more than the content is theirs."""
        more = {"reasoning_content": self.reasoning_content, "name": self.name, "tool_call_id": self.tool_call_id}
        told: dict[str, Any] = {name: value for name, value in more.items() if value is not None}
        if self.tool_calls:
            told["tool_calls"] = list(self.tool_calls)
        return {"role": self.role, "content": self.content, **told}


def read_messages(name: str, value: Any) -> tuple[Message, ...]:
    """A list of messages, one at least."""
    if not isinstance(value, list) or not value:
        raise wrong(name, value, "a list of messages, one at least")
    return tuple(_message(f"{name}[{i}]", message) for i, message in enumerate(value))


def read_tools(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    """Functions that the template tells the model of: their descriptions are the template's to read."""
    if not isinstance(value, list) or len(value) > _MOST_TOOLS:
        raise wrong(name, value, f"a list of up to {_MOST_TOOLS} tools")
    for i, tool in enumerate(value):
        where = f"{name}[{i}]"
        found = read(tool, {"type": Field(text), "function": Field(mapping)}, {}, f"{where}.")
        if found["type"] != "function":
            raise wrong(f"{where}.type", found["type"], '"function": no other tools are known here')
        if not isinstance(found["function"], dict) or not isinstance(found["function"].get("name"), str):
            raise wrong(f"{where}.function", found["function"], "an object with the name of a function")
    return tuple(value)


def _message(where: str, value: Any) -> Message:
    names = ("role", "reasoning_content", "name", "tool_call_id")
    known = {"content": Field(_content), "tool_calls": Field(_calls, ()), **{name: Field(text) for name in names}}
    found = read(value, known, _REFUSED, f"{where}.")
    role = "system" if found["role"] == "developer" else found["role"]
    if role not in _ROLES:
        raise wrong(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    for name, whose in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if found[name] and role != whose:
            raise wrong(f"{where}.{name}", found[name], f"left out: it is of the role {whose!r}, and this is {role!r}")
    if found["content"] is None and not found["tool_calls"]:
        raise ApiError(400, f"{where}.content is missing", param=f"{where}.content", code="missing_field")
    return Message(role, found["content"] or "", *(found[name] for name in (*names[1:3], "tool_calls", names[3])))


def _calls(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list):
        raise wrong(name, value, "a list of calls")
    return tuple(_call(f"{name}[{i}]", call) for i, call in enumerate(value))


def _call(where: str, value: Any) -> dict[str, Any]:
    known = {"id": Field(text), "type": Field(text), "function": Field(mapping), "index": Field(whole(0, _MOST_TOOLS))}
    found = read(value, known, {}, f"{where}.")
    if found["type"] not in (None, "function"):
        raise wrong(f"{where}.type", found["type"], '"function"')
    of = read(found["function"], {"name": Field(text), "arguments": Field(_arguments, {})}, {}, f"{where}.function.")
    if not of["name"]:
        raise ApiError(400, f"{where}.function.name is missing", param=f"{where}.function.name", code="missing_field")
    return ({"id": found["id"]} if found["id"] else {}) | {"type": "function", "function": of}


def _arguments(name: str, value: Any) -> dict[str, Any]:
    """An object, or its JSON as the API has it; "" is none."""
    found = value
    if isinstance(value, str):
        try:
            found = strict_json(value or "{}")
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, dict):
        raise wrong(name, value, "a JSON object, or the text of one")
    return found


def _content(name: str, value: Any) -> str:
    """A text, or text in parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(name, value, "a string or a list of text parts")
    return "".join(_part(f"{name}[{i}]", part) for i, part in enumerate(value))


def _part(where: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text":
        got = kind if isinstance(kind, str) else type(value).__name__
        message = f"{where}: parts of type {got[:40]!r} are not supported, only text"
        raise ApiError(400, message, param=where, code="unsupported")
    known = {"type": Field(text), "text": Field(text, ""), "cache_control": Field(mapping)}  # the last: a hint
    return read(value, known, {}, f"{where}.")["text"]
