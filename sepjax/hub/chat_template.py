"""Chat templates: a model's own text form of a conversation, in Jinja.

A template comes with a checkpoint and is a program. It runs in a process of its own (`sepjax.hub.template_worker`), in
jinja2's sandbox and under limits of time and memory: it can format text and nothing else. What it writes is what
`apply_chat_template` of transformers writes.
"""

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sepjax.config import ConfigError
from sepjax.data.special_tokens import ORDER, SpecialTokenError, SpecialTokens, read_beside
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.errors import HubError
from sepjax.hub.template_process import ask, ask_with_answers

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MOST = 1_000_000  # characters of a template
# Characters that no text may have (Unicode's noncharacters), around what is to be read as text.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
# What is set here or in `sepjax.hub.template_worker`, and not by whoever renders.
_OURS = {"messages", "add_generation_prompt", *ORDER, "raise_exception", "namespace", "strftime_now"}
_DEEPEST = 32  # lists and objects in one another, in a variable
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates have for it, the first the usual one
_MARKED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")


class ChatTemplate:
    """One model's template.

    Attributes:
      source: its text.
    """

    def __init__(self, source: Any, tokens: Mapping[str, str | None] | None = None):
        """Reads a template.

        Args:
          source: its text; or several under names, as in tokenizer_config.json, of which "default" counts.
          tokens: what it may name besides the messages: "bos_token", "eos_token", ...; None: that is not defined.

        Raises:
          HubError: jinja2 is missing, or the template is no valid one.
        """
        self.source = _one_of(source)
        if len(self.source) > _MOST:
            raise HubError(f"a chat template of {len(self.source)} characters; {_MOST} are allowed")
        self._tokens = {name: token for name, token in (tokens or {}).items() if token is not None}
        self._variables: dict[str, Any] = {}
        ask(self.source, None)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The template that came with a tokenizer; None if none did."""
        special = tokenizer.special
        return None if not special.chat_template else cls(special.chat_template, special.names)

    @classmethod
    def of_model(cls, path: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The template that came with a tokenizer, or one that an older workdir has beside it."""
        return cls.of(tokenizer) or (cls.find(path) if path.is_dir() else None)

    @classmethod
    def find(cls, path: Path) -> "ChatTemplate | None":
        """The template of a Hugging Face folder, a workdir made from one, or a GGUF file; None if there is none."""
        if path.is_file() and path.suffix == ".gguf":
            from sepjax.hub.gguf_file import read_special_tokens

            return cls._of_files(read_special_tokens(path))
        for folder in (path / "hub", path, path / "tokenizer"):
            try:
                found = cls._of_files(SpecialTokens.read(read_beside(folder)))
            except SpecialTokenError as error:
                raise HubError(f"{str(folder)!r}: {error}") from error
            if found is not None:
                return found
        return None

    @classmethod
    def _of_files(cls, special: SpecialTokens) -> "ChatTemplate | None":
        names = {**special.by_class, **special.names}
        return cls(special.chat_template, names) if special.chat_template else None

    def with_variables(self, variables: Mapping[str, Any]) -> "ChatTemplate":
        """The same template where it may also name these, in whatever it renders.

        Args:
          variables: JSON values by name, as the model's card has them: {"enable_thinking": False}, or {"tools": [...]}.
            One that the template never asks for changes nothing. They come on top of those that it has already.

        Raises:
          ConfigError: a name that is set here (the messages, special tokens, ...), or a value that is not JSON.
        """
        ours = next((name for name in variables if name in _OURS or name in self._tokens), None)
        if ours is not None:
            raise ConfigError(f"template variable {ours!r} is set by the renderer itself; leave it out")
        found = copy.copy(self)
        found._variables = self._variables | {name: _as_json(x, name) for name, x in variables.items()}
        return found

    def with_plain_variables(self, tokenizer: Tokenizer) -> "ChatTemplate":
        """The same where names of control tokens in the variables are text (`marked`)."""
        found = copy.copy(self)
        found._variables = _each_text(self._variables, lambda text: marked(tokenizer, text))
        return found

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
          messages: {"role": "system" | "user" | "assistant" | "tool", "content": text}, in order; an assistant's may
            have "tool_calls": [{"function": {"name": ..., "arguments": {...}}}, ...], a tool's "tool_call_id".
          add_generation_prompt: whether what stands before an answer comes last.

        Raises:
          HubError: there are no messages; the template refuses them, fails, or asks for too much time or memory.
        """
        return ask(self.source, self._values(messages, add_generation_prompt))

    def _values(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> dict[str, Any]:
        """What the template may name."""
        if not len(messages):
            raise HubError("a chat template needs at least one message")
        return self._tokens | {
            "messages": [_as_templates_read(message) for message in messages],
            "tools": None,
            "documents": None,
            **self._variables,
            "add_generation_prompt": add_generation_prompt,
        }

    def answers(
        self, messages: Sequence[Mapping[str, Any]], *, only_last: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and [first, last) characters of what an assistant says in it.

        That is what the template has in {% generation %}, or behind the prompt for an answer. Raises HubError as
        `render`, and where the first messages are written otherwise than alone.
        """
        values = self._values(messages, False)
        return ask_with_answers(self.source, values, "last" if only_last else "all")

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself, by {% generation %}, what an assistant says."""
        return bool(GENERATION.search(self.source))

    @property
    def key(self) -> str:
        """Another one for every template that could write something else."""
        return json.dumps([self.source, self._tokens, self._variables], sort_keys=True)

    @classmethod
    def of_key(cls, key: str) -> "ChatTemplate":
        """The template that has this `key`."""
        source, tokens, variables = json.loads(key)
        return cls(source, tokens).with_variables(variables)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        control_tokens: bool = True,
        encode: Callable[[Tokenizer, str], list[int]] | None = None,
    ) -> list[int]:
        """The token ids of a conversation, up to where the answer begins; BOS where the template writes it.

        Args:
          tokenizer: the model's.
          messages: see `render`.
          control_tokens: whether names of control tokens in messages and variables are these tokens; False: they are
            text, and only the template's own count.
          encode: gives the ids that `encode_marked` gives; None: that.
        """
        encode = encode or encode_marked
        if control_tokens:
            return encode(tokenizer, self.render(messages))
        messages = [_each_text(dict(message), lambda text: marked(tokenizer, text)) for message in messages]
        return encode(tokenizer, self.with_plain_variables(tokenizer).render(messages))


def _as_templates_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what is None, and with its reasoning under the names that templates read it by."""
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[key] for key in _REASONING if key in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _as_json(value: Any, name: str, depth: int = 0) -> Any:
    """The value as JSON has it; raises ConfigError for one that it has not, or lists of lists of lists without end."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_as_json(x, name, depth + 1) for x in value]
    if depth < _DEEPEST and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _as_json(x, name, depth + 1) for key, x in value.items()}
    raise ConfigError(f"template variable {name!r} must be a JSON value, not too deep, got {type(value).__name__}")


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all its texts changed, and names: templates write those of arguments, too."""
    if isinstance(value, list):
        return [_each_text(x, change) for x in value]
    if isinstance(value, dict):
        return {change(key): _each_text(x, change) for key, x in value.items()}
    return change(value) if isinstance(value, str) else value


def marked(tokenizer: Tokenizer, text: str) -> str:
    """A user's text with the names of control tokens in it marked as text, for `encode_marked`."""
    names, text = _names_of(tokenizer), text.replace(OPEN, "").replace(CLOSE, "")
    return names.sub(rf"{OPEN}\g<0>{CLOSE}", text) if names is not None else text


@functools.lru_cache(maxsize=16)  # a server asks for each message of each request
def _names_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Finds the names of control tokens in a text, the longest first; None: there is none."""
    names = sorted(tokenizer.control_tokens(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def unmarked(text: str) -> str:
    """The text without marks."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that was rendered from `marked` ones: what is marked is encoded as plain characters."""
    ids: list[int] = []
    pieces = _MARKED.split(text)  # text, marked, text, ...; None for a mark whose partner a template took away
    for number, piece in enumerate(pieces):
        if not piece:
            continue
        control = number % 2 == 0  # not what is marked
        ids += (
            encode_behind(tokenizer, piece, control_tokens=control)
            if ids
            else tokenizer.encode(piece, control_tokens=control)
        )
    return ids


def encode_behind(tokenizer: Tokenizer, text: str, *, control_tokens: bool) -> list[int]:
    """The ids of a text that stands behind another one: without the space that comes before a first word."""
    before = "\n" if tokenizer.starts_with_space else ""
    found = tokenizer.encode(before + text, control_tokens=control_tokens)
    lead = tokenizer.encode(before) if before else []
    return found[len(lead) :] if found[: len(lead)] == lead else tokenizer.encode(text, control_tokens=control_tokens)


def _one_of(source: Any) -> str:
    """The text of a template, of the default one where there are several."""
    named = source
    if isinstance(source, list):
        named = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
    if isinstance(named, dict):
        source = named.get("default")
        if not isinstance(source, str):
            names = ", ".join(sorted(str(name)[:40] for name in named)) or "none"
            raise HubError(f"the model has several chat templates, but none named 'default': {names}")
    if not isinstance(source, str):
        raise HubError(f"the chat template is {str(source)[:80]}, expected a text or templates with names")
    return source
