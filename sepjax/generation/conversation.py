"""What is fed to a stream for each turn of a conversation: by the model's own chat template, or in a known form.

A template renders whole conversations, and a turn is appended to what the cache has. So a conversation is rendered with
the new turn and without it, and what is new is fed:

    rendered before   <|user|> Hi <|assistant|> Hello.
    rendered now      <|user|> Hi <|assistant|> Hello. <|end|> <|user|> Why? <|assistant|>
    fed                                                ------------------------------------
"""

import abc
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, override

from sepjax.config import ConfigError
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.chat_template import ChatTemplate, encode_marked, marked, unmarked
from sepjax.hub.errors import HubError

_LONGEST = 200_000  # characters of a conversation that is rendered whole; after them, its last turn alone


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """Token ids around the turns of a conversation, for a model that brings no template."""

    name: str
    begin: tuple[int, ...]  # of the conversation
    user: tuple[tuple[int, ...], tuple[int, ...]]  # before and after what the user says
    system: tuple[tuple[int, ...], tuple[int, ...]]
    answer: tuple[int, ...]  # before an answer
    end: tuple[int, ...]  # after an answer; its first token is the one a model ends it with, if it has such a token
    stop: tuple[str, ...]  # texts that end an answer

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatFormat":
        """ChatML (SmolLM2, Qwen) or Llama 3's, whichever's control tokens the vocabulary has; else plain names."""
        for form in (_chatml, _llama3):
            found = form(tokenizer)
            if found is not None:
                return found
        return _plain(tokenizer)

    def turn(
        self, tokenizer: Tokenizer, text: str, *, before: int | None, system: str = "", control_tokens: bool = False
    ) -> list[int]:
        """The ids of a user's turn, up to where the answer begins.

        Args:
          tokenizer: the model's.
          text: what the user says.
          before: the last token of the answer before; None: this is the first turn.
          system: instructions that stand in front of the first turn.
          control_tokens: whether names of control tokens in what is said are these tokens; else they are text, and
            cannot end the turn.
        """
        ids = list(self.begin if before is None else self.end[1:] if self.end[:1] == (before,) else self.end)
        if before is None and system:
            said = tokenizer.encode(system, control_tokens=control_tokens)
            ids += [*self.system[0], *said, *self.system[1]]
        said = tokenizer.encode(text, control_tokens=control_tokens)
        return [*ids, *self.user[0], *said, *self.user[1], *self.answer]

    def whole(
        self, tokenizer: Tokenizer, messages: Sequence[tuple[str, str]], *, control_tokens: bool = False
    ) -> list[int]:
        """The ids of a conversation from its first message, (role, text) each, up to where the next answer begins."""
        ids = list(self.begin)
        for role, text in messages:
            before, after = self._around(role)
            ids += [*before, *tokenizer.encode(text, control_tokens=control_tokens), *after]
        return [*ids, *self.answer]

    def _around(self, role: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if role == "assistant":
            return self.answer, self.end
        if role == "tool":
            raise ConfigError("a message of a tool needs a chat template, which the model has none of")
        return self.system if role in ("system", "developer") else self.user


@dataclasses.dataclass(frozen=True)
class TurnEnds:
    """What ends an answer of a conversation, beside what is asked for."""

    stop: tuple[str, ...] = ()  # texts
    stop_token_ids: tuple[int, ...] = ()

    def beside(self, options: Mapping[str, Any]) -> dict[str, list[Any]]:
        """`stop` and `stop_token_ids` of these options of generation, and these."""
        return {
            "stop": [*options["stop"], *self.stop],
            "stop_token_ids": [*options["stop_token_ids"], *self.stop_token_ids],
        }


class Conversation(abc.ABC):
    """What `sepjax.generation.chat` needs to know of the form of a conversation.

    Attributes:
      name: of the form.
      stop: texts that end an answer.
      stop_token_ids: tokens that end an answer.
    """

    name: str
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]

    def ends(self, options: Mapping[str, Any]) -> dict[str, list[Any]]:
        """`stop` and `stop_token_ids` of these options of generation, and what ends an answer beside them."""
        return self.turn_ends.beside(options)

    @property
    def turn_ends(self) -> TurnEnds:
        """What ends an answer of it."""
        return TurnEnds(self.stop, self.stop_token_ids)

    @abc.abstractmethod
    def turn(self, text: str, *, before: int | None) -> tuple[list[int], str]:
        """The ids to feed for what the user says, and what is to be reported, if anything.

        Args:
          text: what the user says.
          before: the last token of the answer before; None: this is the first turn.
        """

    @abc.abstractmethod
    def answered(self, text: str) -> None:
        """Notes the answer to the last turn."""

    def copy(self) -> "Conversation":
        """The conversation as it stands, which further turns of this one do not change."""
        return copy.copy(self)


def conversation_of(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    system: str = "",
    control_tokens: bool = False,
    template_variables: Mapping[str, Any] | None = None,
) -> Conversation:
    """A conversation in the model's own form.

    Args:
      tokenizer: the model's.
      template: the model's; None: one of the known forms.
      system: instructions that stand in front of the first turn.
      control_tokens: see `ChatFormat.turn`.
      template_variables: see `ChatTemplate.with_variables`; all turns are rendered with them.

    Raises:
      ConfigError: variables that cannot be, or without a template.
    """
    if template_variables and template is None:
        raise ConfigError("template_variables do nothing for a model without a chat template; leave them out")
    if template is None:
        return _InForm(tokenizer, system, control_tokens)
    return _ByTemplate(tokenizer, template.with_variables(template_variables or {}), system, control_tokens)


class _InForm(Conversation):
    """Turns in one of the known forms."""

    def __init__(self, tokenizer: Tokenizer, system: str, control_tokens: bool):
        self._form, self._tokenizer = ChatFormat.of(tokenizer), tokenizer
        self._system, self._control_tokens = system, control_tokens
        self.name, self.stop = self._form.name, self._form.stop
        self.stop_token_ids = tuple(i for i in self._form.end[:1] if not tokenizer.token_bytes(i))

    @override
    def turn(self, text: str, *, before: int | None) -> tuple[list[int], str]:
        settings = {"system": self._system, "control_tokens": self._control_tokens}
        return self._form.turn(self._tokenizer, text, before=before, **settings), ""

    @override
    def answered(self, text: str) -> None:
        pass  # each turn has the same form, whatever was said before


class _ByTemplate(Conversation):
    """Turns as the model's template writes them."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, system: str, control_tokens: bool):
        self._tokenizer, self._control_tokens = tokenizer, control_tokens
        self._template = template if control_tokens else template.with_plain_variables(tokenizer)
        self._first = [{"role": "system", "content": self._said(system)}] if system else []
        self._messages: list[dict[str, str]] = []  # up to the last answer; none: not known (a conversation resumed)
        self._text = ""  # of the conversation so far, as it was fed and answered
        self._reported: set[str] = set()
        self._other: _InForm | None = None  # what goes on where the template cannot
        self.name, self.stop = "the model's own template", ()
        self.stop_token_ids = self._end_of_turn()

    @override
    def turn(self, text: str, *, before: int | None) -> tuple[list[int], str]:
        said = {"role": "user", "content": self._said(text)}
        if before is None:
            self._messages = [*self._first, said]
            self._text = self._template.render(self._messages)
            return encode_marked(self._tokenizer, self._text), ""
        if self._other is None:
            try:
                new, report = self._new(said)
            except HubError as error:
                self._other = _InForm(self._tokenizer, "", self._control_tokens)
                ids, _ = self._other.turn(text, before=before)
                return ids, f"({error}; turns go on in the format {self._other.name})"
            ids = encode_marked(self._tokenizer, new)
            return ids[1:] if ids[:1] == [before] else ids, self._once(report)
        return self._other.turn(text, before=before)

    @override
    def answered(self, text: str) -> None:
        if self._messages:
            self._messages.append({"role": "assistant", "content": text})
            self._text += text

    @override
    def copy(self) -> "Conversation":
        other = copy.copy(self)
        other._messages, other._reported = list(self._messages), set(self._reported)
        return other

    def _said(self, text: str) -> str:
        return text if self._control_tokens else marked(self._tokenizer, text)

    def _new(self, said: dict[str, str]) -> tuple[str, str]:
        """What the template writes between the last answer and the next one, and what is to be reported."""
        known = self._messages and self._messages[-1]["role"] == "assistant" and len(self._text) <= _LONGEST
        history = self._messages[:-1] if known else [*self._first, {"role": "user", "content": "-"}]
        new = self._after_answer([*history], said)
        if not known:
            self._messages = []
            return new, ""
        whole = self._template.render([*self._messages, said])
        self._text += new
        self._messages.append(said)
        if _letters(whole) == _letters(self._text):
            return new, ""
        return new, "(the model's template rewrites earlier turns; here they stay as they were said)"

    def _after_answer(self, history: list[dict[str, str]], said: dict[str, str] | None) -> str:
        """What follows an answer: a stand-in for it is looked for, since templates strip and trim."""
        texts = "".join(message["content"] for message in [*history, *([said] if said else [])])
        answer = next(word for n in range(10**6) if (word := f"answer{n}") not in texts + self._template.key)
        messages = [*history, {"role": "assistant", "content": answer}, *([said] if said else [])]
        written = self._template.render(messages, add_generation_prompt=said is not None)
        _, found, after = written.partition(answer)
        if not found or answer in after:
            raise HubError("the chat template does not write an answer once, as it is")
        return after

    def _end_of_turn(self) -> tuple[int, ...]:
        """The control token that the template writes behind an answer, if it does so."""
        try:
            after = self._after_answer([*self._first, {"role": "user", "content": "-"}], None)
        except HubError:
            return ()
        return tuple(i for i in self._tokenizer.encode(after)[:1] if not self._tokenizer.token_bytes(i))

    def _once(self, report: str) -> str:
        new = "" if report in self._reported else report
        self._reported.add(report)
        return new


def _letters(text: str) -> str:
    """The text without blanks, which templates strip and trim."""
    return "".join(unmarked(text).split())


def _chatml(tokenizer: Tokenizer) -> ChatFormat | None:
    start, end = (tokenizer.control_id(f"<|im_{name}|>") for name in ("start", "end"))
    if start is None or end is None:
        return None
    newline = tuple(tokenizer.encode("\n"))

    def said_by(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (start, *tokenizer.encode(f"{name}\n")), (end, *newline)

    return ChatFormat("ChatML", (), said_by("user"), said_by("system"), said_by("assistant")[0], (end, *newline), ())


def _llama3(tokenizer: Tokenizer) -> ChatFormat | None:
    names = ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
    ids = [tokenizer.control_id(f"<|{name}|>") for name in names]
    if any(i is None for i in ids):
        return None
    begin, start, end, eot = (i for i in ids if i is not None)

    def said_by(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (start, *tokenizer.encode(name), end, *tokenizer.encode("\n\n")), (eot,)

    return ChatFormat("Llama 3", (begin,), said_by("user"), said_by("system"), said_by("assistant")[0], (eot,), ())


def _plain(tokenizer: Tokenizer) -> ChatFormat:
    newline = tuple(tokenizer.encode("\n"))
    user, answer = (tuple(tokenizer.encode(f"{name}:")) for name in ("User", "Assistant"))
    begin = tuple(tokenizer.prefix)
    return ChatFormat("plain", begin, (user, newline), ((), newline), answer, newline, ("\nUser:",))
