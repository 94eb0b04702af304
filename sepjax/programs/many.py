"""Many prompts of a file, for `sepjax generate --prompts`: encoded, answered in batches, and what of each is told."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sepjax.config import UserError
from sepjax.console import say
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.batch import Generation
from sepjax.generation.conversation import ChatFormat, Conversation, conversation_of
from sepjax.generation.engine import Generator
from sepjax.generation.prepared import marks_of
from sepjax.generation.prompts import Prompt, row_keys
from sepjax.hub.chat_template import ChatTemplate
from sepjax.programs.prompt_lines import Line, encoded
from sepjax.progress import counted


@dataclasses.dataclass(frozen=True)
class Many:
    """Prompts as token ids; those of conversations are in a form that says what ends their answers."""

    prompts: list[Prompt]
    are_chats: list[bool]
    form: Conversation

    def digest(self) -> str:
        """Another one for other prompts."""
        told = [self.prompts, self.are_chats, self.form.stop, self.form.stop_token_ids]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def encode_all(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    lines: Sequence[Line],
    *,
    as_messages: bool,
    control_tokens: bool | None,
) -> Many:
    """The prompts of a file.

    Args:
      tokenizer: the model's.
      template: the model's.
      lines: of the file.
      as_messages: whether texts, too, go into the template, each as a user's message.
      control_tokens: whether names of control tokens are these tokens; None: in texts, not in conversations.

    Raises:
      UserError: there is no template that texts could go into.
      DataError: a prompt that the model cannot be given, with its line.
    """
    if as_messages and template is None:
        raise UserError("the model has no chat template; leave out --apply_chat_template")
    form, chat = ChatFormat.of(tokenizer), conversation_of(tokenizer, template)
    are_chats = [bool(line.messages) or as_messages for line in lines]
    if any(are_chats):
        say(f"chat format: {chat.name}")
    each = counted(lines, "encoding the prompts", len(lines), "prompts")
    control = {"as_messages": as_messages, "control_tokens": control_tokens}
    prompts: list[Prompt] = [encoded(line, tokenizer, template, form, **control) for line in each]
    return Many(prompts, are_chats, chat)


def asked_of(engine: Generator, many: Many, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that an answer depends on, by names of settings: plain JSON."""
    attention = engine.kept if options.get("bounded") else engine.attention
    found = {name: x for name, x in options.items() if name not in ("sampling", "control_tokens")}
    found |= {"sampling": repr(options["sampling"]), "dtype": engine.prepared.config.dtype}
    found |= {f"attention.{name}": x for name, x in dataclasses.asdict(attention).items()}
    weights = hashlib.sha256(b"".join(marks_of(engine.prepared.params))).hexdigest()
    return {"prompts": many.digest(), "model": weights} | found


def answer_many(
    engine: Generator,
    many: Many,
    options: Mapping[str, Any],
    *,
    batch_size: int,
    done: Mapping[int, Any],
    answered: Callable[[dict[int, Generation]], object],
) -> None:
    """Answers the prompts, those of conversations apart: other tokens end them.

    Each answer is the one of `Generator.generate` for the whole list.

    Args:
      engine: of the model.
      many: the prompts.
      options: of `Generator.generate`.
      batch_size: see there.
      done: numbers of prompts that are answered already.
      answered: gets the answers of each batch, by the numbers of their prompts.
    """
    keys = row_keys(options["seed"], len(many.prompts))
    for chats in (False, True):
        numbers = [i for i, is_chat in enumerate(many.are_chats) if is_chat is chats and i not in done]
        if not numbers:
            continue
        ends: dict[str, Any] = many.form.ends(options) if chats else {}

        def take(found: Mapping[int, Generation], numbers: list[int] = numbers) -> None:
            answered({numbers[place]: answer for place, answer in found.items()})

        own = {"seed": keys[np.array(numbers)], "batch_size": batch_size, "answered": take}
        engine.generate([many.prompts[i] for i in numbers], **{**options, **ends, **own})


def told(answer: Generation) -> dict[str, Any]:
    """What is told of an answer, as JSON has it."""
    found: dict[str, Any] = {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.token_ids),
    }
    if answer.logprobs is not None:
        found["logprobs"] = {"token_ids": answer.token_ids, "token_logprobs": answer.logprobs}
        if answer.top_logprobs is not None:
            found["logprobs"]["top_logprobs"] = [{str(i): x for i, x in step} for step in answer.top_logprobs]
    return found
