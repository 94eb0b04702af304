"""Records of JSON lines and Parquet: conversations, prompts with completions, or plain texts.

{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
{"prompt": "...", "completion": "..."}        a turn of each; both may be lists of messages
{"text": "..."}                               a document, under the name of `data.text_key`

An assistant's message may have "tool_calls" (beside its content or in its place), a message of the role "tool" says
what a call gave, and "tools" beside the messages describes the functions: lists as OpenAI's API has them.

Other fields of a conversation are notes (an id, a source), but for those that would change its text: these are refused.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sepjax.config.checks import once
from sepjax.data.errors import DataError
from sepjax.data.marks import CLOSE, OPEN

ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields beside the messages that templates read, or that say something of the answer; nothing here does.
_NOT_READ = (
    "audio", "audios", "chat_template_kwargs", "chosen", "documents", "function_call", "functions", "images",
    "rejected", "response_format", "system", "enable_thinking", "tool_choice", "videos",
)  # fmt: skip
_DEEPEST = 32  # lists and objects in one another, in a call or a tool
FIELDS = frozenset({"messages", "prompt", "completion", "tools", *_NOT_READ})  # of a conversation, that are looked at
type Message = Mapping[str, Any]


@runtime_checkable
class Form(Protocol):
    """How conversations become texts: a chat template, and what of it is scored (`data.train_on`)."""

    @property
    def train_on(self) -> str:
        """Of `DataConfig`."""
        ...

    @property
    def key(self) -> str:
        """Changes where any text would."""
        ...

    def __call__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of a conversation, what is scored between marks; DataError where it cannot be written."""
        ...


class RecordError(ValueError):
    """A record that cannot be used; the message is a reason to put behind its place."""


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; raises RecordError."""
    record = value_of(line)
    if not isinstance(record, dict):
        raise RecordError(f"it is {str(record)[:40]!r}, expected a JSON object")
    return record


def value_of(line: bytes) -> Any:
    """What a line of JSON says; raises RecordError."""
    try:
        return json.loads(line, object_pairs_hook=once)
    except RecursionError:
        raise RecordError("it is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise RecordError(f"it is not JSON: {error}") from error


def kind_of(record: Mapping[str, Any], text_key: str) -> str:
    """ "conversation" or "text"; raises RecordError for a record that is neither."""
    if "messages" in record or {"prompt", "completion"} <= record.keys():
        return "conversation"
    if text_key in record:
        return "text"
    names = ", ".join(repr(str(name)[:30]) for name in list(record)[:8]) or "none"
    raise RecordError(f"it has the fields {names}, expected 'messages', 'prompt' with 'completion', or {text_key!r}")


def text_of(record: Mapping[str, Any], text_key: str) -> str:
    """The text of a plain document; raises RecordError."""
    if text_key not in record:
        raise RecordError(f"it has no {text_key!r}, as records before it have")
    return _text(record[text_key], text_key)


def messages_of(record: Mapping[str, Any], *, answers: bool) -> list[dict[str, Any]]:
    """The messages of a conversation.

    Args:
      record: see the heading of this file.
      answers: whether there must be one of an assistant's.

    Raises:
      RecordError: it has none, a message without a known role and a text, or a field that would change its text and is
        not read.
    """
    for name in _NOT_READ:
        if record.get(name):
            raise RecordError(
                f"{name!r} is not read, and would change the conversation; write what it says into the messages, or "
                "take the field out"
            )
    if "messages" in record:
        messages = _messages(record["messages"], "messages", "")
    elif {"prompt", "completion"} <= record.keys():
        messages = _messages(record["prompt"], "prompt", "user")
        messages += _messages(record["completion"], "completion", "assistant")
    else:
        raise RecordError("it has neither 'messages' nor 'prompt' with 'completion', as records before it have")
    if answers and not any(message["role"] == "assistant" for message in messages):
        raise RecordError("no message is an assistant's, so there is nothing to learn")
    return messages


def tools_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that the model of a conversation may call: a list of objects, or its JSON. Raises RecordError."""
    found = record.get("tools") or []
    tools = _parsed(found) if isinstance(found, str) else found
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(f"'tools' is {str(found)[:40]!r}, expected a list of objects")
    return _checked(tools, "tools")


def _messages(given: Any, name: str, role: str) -> list[dict[str, Any]]:
    """The messages of a list, or of a text that someone of `role` says."""
    if role and isinstance(given, str):
        return [{"role": role, "content": _text(given, name)}]
    if not isinstance(given, list) or not given:
        expected = "a text or a list of messages" if role else "a list of messages"
        raise RecordError(f"{name!r} is {str(given)[:40]!r}, expected {expected}")
    return [_message(message, f"{name}[{number}]") for number, message in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise RecordError(f"{where} is {str(given)[:40]!r}, expected an object with 'role' and 'content'")
    if given.get("function_call"):
        raise RecordError(f"{where} has 'function_call', which is not read: write it as 'tool_calls'")
    calls = _calls(given.get("tool_calls") or [], f"{where}.tool_calls")
    for name in ("role", "content"):
        if name not in given and not (calls and name == "content"):
            raise RecordError(f"{where} has no {name!r}")
    if given.get("content") is None and not calls:
        raise RecordError(f"{where} has null for 'content', expected a text, or 'tool_calls'")
    if given["role"] not in ROLES:
        raise RecordError(f"{where} has the role {str(given['role'])[:40]!r}, expected one of {', '.join(ROLES)}")
    if calls and given["role"] != "assistant":
        raise RecordError(f"{where} has 'tool_calls', which an assistant's message has, and this is {given['role']!r}")
    read = ("tool_calls", "function_call")
    values = {name: value for name, value in given.items() if value is not None and name not in read}
    said = {"content": "", **values} if calls else values
    found: dict[str, Any] = {name: _text(value, f"{where}.{name}") for name, value in said.items()}
    return found | ({"tool_calls": calls} if calls else {})


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    """Calls as chat templates read them: the arguments are objects."""
    if not isinstance(given, list):
        raise RecordError(f"{where} is {str(given)[:40]!r}, expected a list of calls")
    return [_call(call, f"{where}[{number}]") for number, call in enumerate(given)]


def _call(given: Any, where: str) -> dict[str, Any]:
    of = given.get("function") if isinstance(given, dict) else None
    if not isinstance(of, dict) or not isinstance(of.get("name"), str) or not of["name"]:
        raise RecordError(
            f"{where} is {str(given)[:60]!r}, expected an object with 'function': its 'name', 'arguments'"
        )
    told = of.get("arguments")
    arguments = _parsed(told or "{}") if told is None or isinstance(told, str) else told
    if not isinstance(arguments, dict):
        raise RecordError(f"{where}.function.arguments is {str(told)[:40]!r}, expected an object, or the JSON of one")
    number = {"id": _text(given["id"], f"{where}.id")} if given.get("id") is not None else {}
    return number | {"type": "function", "function": _checked({"name": of["name"], "arguments": arguments}, where)}


def _parsed(text: str) -> Any:
    """What JSON in a text says; None: it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _checked(value: Any, where: str, depth: int = 0) -> Any:
    """The same JSON, with texts that a text may have."""
    if depth > _DEEPEST:
        raise RecordError(f"{where} is nested too deeply")
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, list):
        return [_checked(x, where, depth + 1) for x in value]
    if isinstance(value, dict):
        return {_text(name, where): _checked(x, where, depth + 1) for name, x in value.items()}
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where!r} is {str(value)[:40]!r}, expected a text")
    if value.isascii():  # which Python knows without a look at the characters
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{where!r} has half of a surrogate pair at character {error.start}") from error
    if OPEN in value or CLOSE in value:
        raise RecordError(f"{where!r} has U+FDD2 or U+FDD3, which no text may have")
    return value


class NoFormError(DataError):
    """Conversations are to be read, and nothing tells how they are written."""


def no_form(name: str) -> NoFormError:
    """What to say then."""
    return NoFormError(
        f"{name} has conversations, but the model's tokenizer has no chat template to write them by; begin with a "
        "model that has one (training.init_from), or put a chat_template.jinja beside its tokenizer"
    )
