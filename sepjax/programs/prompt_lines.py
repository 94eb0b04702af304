"""What `sepjax generate --prompts` reads: JSON Lines, a prompt each.

"The function"                                                    a text
{"prompt": "The function", "id": "a-1"}                           the same, with a name that its answer gets
{"messages": [{"role": "user", "content": "Hi"}], "tools": [...]} a conversation, up to where the answer begins
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from sepjax.config import ConfigError, UserError, nearest
from sepjax.data.conversations import RecordError, messages_of, text_of, tools_of, value_of
from sepjax.data.corpora.files import kind_of_file, root_of
from sepjax.data.corpora.rows import records
from sepjax.data.errors import DataError

if TYPE_CHECKING:
    from sepjax.data.tokenizer import Tokenizer
    from sepjax.generation.conversation import ChatFormat
    from sepjax.hub.chat_template import ChatTemplate

_KEYS = ("prompt", "messages", "tools", "id")


@dataclasses.dataclass(frozen=True)
class Line:
    """One prompt: a text or a conversation."""

    place: str  # "FILE:LINE"
    id: str | int | None
    text: str
    messages: tuple[dict[str, Any], ...] = ()  # none: it is a text
    tools: tuple[dict[str, Any], ...] = ()


def read_lines(path: str) -> list[Line]:
    """The prompts of a file (.jsonl, .ndjson, also packed: .gz, .zst). Empty lines are passed over.

    Raises:
      ConfigError: a file of another name, or without prompts.
      DataError: it cannot be read, or a line is no prompt: names the line, and the key.
    """
    file = root_of(path)
    if kind_of_file(file) != "lines":
        raise ConfigError(
            f"--prompts={path} is to be JSON Lines, named .jsonl or .ndjson (packed: .jsonl.gz, .jsonl.zst)"
        )
    found: list[Line] = []
    for place, raw in records([file], ""):
        try:
            found.append(_line(place, value_of(raw) if isinstance(raw, bytes) else raw))
        except RecordError as error:
            raise DataError(f"{place}: {error}") from error
    if not found:
        raise ConfigError(f"--prompts={path} has no prompts; give one a line")
    return found


def _line(place: str, value: Any) -> Line:
    if isinstance(value, str):
        return Line(place, None, text_of({"line": value}, "line"))
    if not isinstance(value, dict):
        raise RecordError(f"it is {str(value)[:40]!r}, expected a text, or an object with 'prompt' or 'messages'")
    for name in value:
        if name not in _KEYS:
            raise RecordError(f"it has {name[:40]!r}, expected one of {', '.join(_KEYS)}{nearest(name, _KEYS)}")
    given = [name for name in ("prompt", "messages") if name in value]
    if len(given) != 1:
        raise RecordError(f"it has {' and '.join(map(repr, given)) or 'neither'}, expected 'prompt' or 'messages'")
    name = value.get("id")
    if isinstance(name, str):
        name = text_of(value, "id")
    elif name is not None and type(name) is not int:
        raise RecordError(f"'id' is {str(name)[:40]!r}, expected a text or a whole number")
    if "prompt" in value:
        if "tools" in value:
            raise RecordError("it has 'tools' beside 'prompt', which no template puts in; give 'messages'")
        return Line(place, name, text_of(value, "prompt"))
    messages = messages_of({"messages": value["messages"]}, answers=False)
    return Line(place, name, "", tuple(messages), tuple(tools_of(value)))


def encoded(
    line: Line,
    tokenizer: "Tokenizer",
    template: "ChatTemplate | None",
    form: "ChatFormat",
    *,
    as_messages: bool,
    control_tokens: bool | None,
) -> list[int]:
    """The ids of a prompt.

    Args:
      line: the prompt.
      tokenizer: the model's.
      template: the model's.
      form: of conversations where there is no template.
      as_messages: whether a text is what a user says.
      control_tokens: whether names of control tokens are these tokens; None: in texts, not in conversations.

    Raises DataError for a prompt that the model cannot be given, with its line.
    """
    from sepjax.generation.prompts import encode_prompts
    from sepjax.hub.tool_calls import check_written

    control = not line.messages if control_tokens is None else control_tokens
    try:
        if not line.messages and not as_messages:
            return encode_prompts(tokenizer, [line.text], control_tokens=control)[0]
        messages = line.messages or ({"role": "user", "content": line.text},)
        if template is not None:
            check_written(template, messages, line.tools)
            template = template.with_variables({"tools": list(line.tools)} if line.tools else {})
            return template.encode(tokenizer, messages, control_tokens=control)
        if line.tools:
            raise ConfigError("'tools' are for a chat template, which the model has none of; take them out")
        if any(message.get("tool_calls") for message in messages):
            raise ConfigError("'tool_calls' are for a chat template, which the model has none of; take them out")
        said = [(message["role"], message["content"]) for message in messages]
        return form.whole(tokenizer, said, control_tokens=control)
    except UserError as error:
        raise DataError(f"{line.place}: {error}") from error
