"""chats in the terminal, over one bounded cache

    sepjax chat --model=smollm2-135m [--system="Answer in one sentence." --cache_size=800 ...]
    sepjax chat --model=smollm2-135m --resume=kept            continues what /save saved

Ctrl-C stops an answer; /quit or Ctrl-D ends the conversation. In a terminal, /help lists the commands, and the package
prompt_toolkit (the extra `chat`) gives line editing.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from sepjax.config import ConfigError
from sepjax.programs.writing import Writing

if TYPE_CHECKING:
    from sepjax.generation.conversation import Conversation
    from sepjax.generation.stream import Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Writing):
    """How it begins."""

    system: str = ""  # system message in front of the first turn
    private: bool = False  # in a terminal: do not keep the input history for the next chat

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system and self.resume is not None:
            raise ConfigError(
                "--system does nothing beside --resume: instructions stand in front of the first turn, which a saved "
                "conversation has behind it; leave one of them out"
            )


def main(settings: Settings) -> None:
    """Talks."""
    import sepjax
    from sepjax.console import say
    from sepjax.generation import terminal
    from sepjax.generation.chat import chat
    from sepjax.generation.conversation import conversation_of
    from sepjax.generation.talk import Talk
    from sepjax.loading import load

    settings.check_resume()
    model, tokenizer = load(settings.path, **settings.loading, param_dtype="working")
    template, control = settings.template(tokenizer), settings.control_tokens is True
    new = settings.max_new_tokens
    settings.warn(model, tokenizer, [], new)
    kept = settings.kept_in_words(model)
    given: dict[str, Any] = settings.options(tokenizer) | settings.endless()
    engine = sepjax.Generator(model, tokenizer, settings.attention(model), consume=True)
    del model  # one copy of its weights is enough

    def begin(system: str, resume: str | None = None) -> "tuple[Stream, Conversation]":
        form = conversation_of(tokenizer, template, system=system, control_tokens=control)
        options: dict[str, Any] = given | form.ends(given) | {"resume": resume}
        return engine.stream(max_new_tokens=new, control_tokens=control, **options), form

    events, form = begin(settings.system, settings.resume)
    if kept:
        say(kept)
    if terminal.is_terminal():
        talk = Talk(begin, (events, form), system=settings.system)
        terminal.talk_on(talk, terminal.screen_of(private=settings.private))
    else:
        chat(events, tokenizer, conversation=form)
