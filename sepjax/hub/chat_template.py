"""Chat templates: a model's own text form of a conversation, in Jinja, run in the sandbox of the package jinja2.

A template comes with a checkpoint and is a program. The sandbox lets it format text and nothing else: no files, no
imports, no attributes of Python's own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Never

from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_MOST = 1_000_000  # characters of a template, and of what it writes


class ChatTemplate:
    """One model's template.

    Attributes:
      source: its text.
    """

    def __init__(self, source: str, tokens: Mapping[str, Any] | None = None):
        """Compiles a template.

        Args:
          source: its text.
          tokens: what it may name besides the messages: "bos_token", "eos_token", ...

        Raises:
          HubError: jinja2 is missing, or the template is no valid one.
        """
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ModuleNotFoundError as error:
            raise HubError("a chat template needs the package jinja2: pip install jinja2") from error
        if len(source) > _MOST:
            raise HubError(f"a chat template of {len(source)} characters; {_MOST} are allowed")
        self.source, self._tokens = source, dict(tokens or {})
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise HubError(f"the chat template cannot be read: {error}") from error

    @classmethod
    def find(cls, path: Path) -> "ChatTemplate | None":
        """The template of a Hugging Face folder, a workdir made from one, or a GGUF file; None if there is none."""
        if path.is_file() and path.suffix == ".gguf":
            return cls._of_gguf(path)
        folder = next((f for f in (path / "hub", path) if (f / _CONFIG).is_file() or (f / _FILE).is_file()), None)
        if folder is None:
            return None
        values = Fields.read(folder / _CONFIG).values if (folder / _CONFIG).is_file() else {}
        source = values.get("chat_template")
        if isinstance(source, list):  # several named ones
            source = next(
                (x.get("template") for x in source if isinstance(x, dict) and x.get("name") == "default"), None
            )
        if (folder / _FILE).is_file():
            try:
                source = (folder / _FILE).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise HubError(f"{str(folder / _FILE)!r} is no UTF-8 text: {error}") from error
        return cls(source, {k: _text(v) for k, v in values.items() if k.endswith("_token")}) if source else None

    @classmethod
    def _of_gguf(cls, path: Path) -> "ChatTemplate | None":
        from sepjax.hub.gguf_file import read_fields

        fields = read_fields(path)
        tokens = fields.get("tokenizer.ggml.tokens")
        if "tokenizer.chat_template" not in fields or tokens is None:
            return None
        ids = {f"{name}_token": fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        return cls(
            fields["tokenizer.chat_template"].contents(),
            {name: tokens.contents(i.contents()) for name, i in ids.items() if i is not None},
        )

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": text}, in order.
          add_generation_prompt: whether what stands before an answer comes last.

        Raises:
          HubError: the template refuses the messages, or fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )[:_MOST]
        except Exception as error:  # a template is a program of somebody else's: anything may go wrong in it
            raise HubError(f"the chat template fails: {error}") from error


def _refuse(message: str) -> Never:
    """What templates call for messages that they cannot write."""
    raise ValueError(message)


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
