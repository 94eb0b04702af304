"""talks in turns over one bounded cache

    sepjax chat --model=smollm2-135m [--system="Answer in one sentence." --cache_size=800 ...]
    sepjax chat --model=smollm2-135m --resume=kept            goes on with what /save kept

Ctrl-C cuts an answer short, /quit or Ctrl-D ends the conversation.
"""

import dataclasses
from typing import Any

from sepjax.config import ConfigError
from sepjax.programs.writing import Writing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Writing):
    """How it begins."""

    system: str = ""  # instructions in front of the first turn

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
    from sepjax.generation.chat import chat
    from sepjax.generation.conversation import conversation_of
    from sepjax.loading import load

    model, tokenizer = load(settings.path, **settings.loading)
    template, control = settings.template(tokenizer), settings.control_tokens is True
    form = conversation_of(tokenizer, template, system=settings.system, control_tokens=control)
    options = settings.options(model) | settings.endless()
    options["stop"] = [*settings.stop, *form.stop]
    options["stop_token_ids"] = [*settings.stop_token_ids, *form.stop_token_ids]
    new = settings.max_new_tokens
    settings.warn(model, tokenizer, [], new, bounded=True)
    events: Any = sepjax.stream(model, tokenizer, max_new_tokens=new, control_tokens=control, **options)
    chat(events, tokenizer, conversation=form)
