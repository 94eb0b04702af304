"""Conversations as training reads them: written by the model's chat template, with marks around what is scored."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sepjax.config import ConfigError, DataConfig
from sepjax.data.conversations import Message
from sepjax.data.errors import DataError
from sepjax.data.scored import marked
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.chat_template import ChatTemplate
from sepjax.hub.errors import HubError
from sepjax.hub.tool_calls import check_written

_NOT_THE_LAST = ("otherwise once others follow", "cannot write a prompt before it")  # what ails earlier answers alone


@dataclasses.dataclass(frozen=True)
class TrainingForm:
    """A `sepjax.data.conversations.Form`.

    Attributes:
      template: the model's.
      train_on: see `DataConfig`.
      ends: names of the tokens that end an answer; an answer is scored up to the last of them that its turn has.
    """

    template: ChatTemplate
    train_on: str
    ends: tuple[str, ...]

    @property
    def key(self) -> str:
        """See `Form`."""
        return json.dumps([self.template.key, self.train_on, self.ends])

    def __call__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """See `Form`."""
        try:
            check_written(self.template, messages, tools)
            template = self.template.with_variables({"tools": list(tools)} if tools else {})
            if self.train_on == "all":
                text = template.render(messages, add_generation_prompt=False)
                return marked(text, [(0, len(text))])
            text, spans = template.answers(messages, only_last=self.train_on == "last")
        except (ConfigError, HubError) as error:
            hint = ""
            if self.train_on != "last" and any(reason in str(error) for reason in _NOT_THE_LAST):
                hint = "; with data.train_on='last' the last answer alone is scored"
            raise DataError(f"{error}{hint}") from error
        return marked(text, [(first, self._end(text, first, last)) for first, last in spans])

    def _end(self, text: str, first: int, last: int) -> int:
        """Where an answer ends: what a template writes behind its end token (a newline) nobody is to say."""
        if self.template.marks_answers:
            return last
        found = [text.rfind(name, first, last) + len(name) for name in self.ends if name in text[first:last]]
        return max(found, default=last)


def training_form(data: DataConfig, tokenizer: Tokenizer) -> TrainingForm | None:
    """How the model with this tokenizer is trained on conversations; None without a chat template.

    Raises:
      HubError: the template cannot be read.
    """
    template = ChatTemplate.of(tokenizer)
    if template is None:
        return None
    ends = {tokenizer.control_id(name): name for name in tokenizer.control_tokens()}
    return TrainingForm(template, data.train_on, tuple(ends[i] for i in tokenizer.end_ids if i in ends))
