"""The model that answers: how requests become token ids and slots' requests."""

import contextlib
import dataclasses
import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sepjax.array_typing import Int32
from sepjax.config.versions import told
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.cache.mixed import BoundedSizes, bounded_sizes
from sepjax.generation.conversation import ChatFormat, TurnEnds, conversation_of
from sepjax.generation.engine import Generator
from sepjax.generation.prepared import marks_of
from sepjax.generation.prompts import encode_prompts, recommended_sampling
from sepjax.generation.readers import BoundedReader
from sepjax.generation.row import CacheUse, Ends, RowSettings
from sepjax.generation.sampling import Sampling
from sepjax.generation.slots import SlotRequest
from sepjax.hub.chat_template import ChatTemplate, encode_behind
from sepjax.hub.tool_calls import written
from sepjax.serve.encoded import EncodedTexts
from sepjax.serve.errors import ApiError, naming
from sepjax.serve.fields import wrong
from sepjax.serve.messages import Message
from sepjax.serve.protocol import Wanted


class Zones(NamedTuple):
    """Entries of a cache by where they stand in the text; where layers differ, averages over them."""

    sinks: int  # the first tokens
    kept: int  # out of the past
    recent: int  # the newest


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """What a process that has no device knows of a model beside its tokenizer."""

    tokenizer: Tokenizer
    cache_size: int  # of a row
    num_sinks: int  # of its cache


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """Made by `create`, or in a process without a device by `of_told`."""

    name: str  # what clients call it
    engine: Any  # the `Generator`, or `Elsewhere`
    template: ChatTemplate | None
    form: ChatFormat  # of conversations, where there is no template
    turn_ends: TurnEnds  # what ends an answer in a chat
    max_prompt_tokens: int  # 0: as long as they like
    fingerprint: str  # of the weights, and how they are used
    control_names: dict[int, str]
    sizes: BoundedSizes | Elsewhere  # of a row's cache
    mesh: Any  # that it was made under; empty: one device
    alias: str | None = None  # what they may call it too
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of requests that do not say otherwise
    encoded: EncodedTexts = dataclasses.field(default_factory=EncodedTexts)  # conversations so far

    @classmethod
    def create(
        cls,
        name: str,
        engine: Generator,
        template: ChatTemplate | None,
        *,
        max_prompt_tokens: int = 0,
        alias: str | None = None,
        sampling_defaults: bool = False,
    ) -> "Served":
        """Looks at the model's tokens and weights once.

        Args:
          name: what clients call the model.
          engine: over a pattern that a bounded cache can serve; made under the mesh that is set here.
          template: of conversations; None: one of the known forms (`ChatFormat.of`).
          max_prompt_tokens: of one prompt; 0: no limit.
          alias: another name that clients may say.
          sampling_defaults: whether requests that do not say how to draw are answered as generation_config.json says.

        Raises:
          ConfigError: there is no such file, or it has values of another kind.
        """
        tokenizer = engine.tokenizer
        names = {i: text for text in tokenizer.control_tokens() if (i := tokenizer.control_id(text)) is not None}
        names |= {
            i: text for text, i in (("<s>", tokenizer.bos_id), ("</s>", tokenizer.eos_id)) if i not in names and i
        }
        return cls(
            name, engine, template, ChatFormat.of(tokenizer), conversation_of(tokenizer, template).turn_ends,
            max_prompt_tokens, fingerprint(engine), names, bounded_sizes(engine.prepared.config, engine.kept),
            jax.sharding.get_mesh(), alias, recommended_sampling(tokenizer) if sampling_defaults else {},
        )  # fmt: skip

    def told(self) -> dict[str, Any]:
        """What `of_told` needs beside tokenizer and template, as JSON."""
        names = {str(i): text for i, text in self.control_names.items()}
        return {
            "name": self.name, "turn_ends": dataclasses.asdict(self.turn_ends), "names": names,
            "max_prompt_tokens": self.max_prompt_tokens, "fingerprint": self.fingerprint,
            "cache_size": self.sizes.cache_size, "num_sinks": self.sizes.num_sinks, "alias": self.alias,
            "defaults": dict(self.defaults),
        }  # fmt: skip

    @classmethod
    def of_told(cls, told: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None) -> "Served":
        """The same model for a process that reads requests and writes answers, and has no device."""
        elsewhere = Elsewhere(tokenizer, told["cache_size"], told["num_sinks"])
        names = {int(i): text for i, text in told["names"].items()}
        ends = TurnEnds(**{name: tuple(found) for name, found in told["turn_ends"].items()})
        return cls(
            told["name"], elsewhere, template, ChatFormat.of(tokenizer), ends, told["max_prompt_tokens"],
            told["fingerprint"], names, elsewhere, None, told["alias"], told["defaults"],
        )  # fmt: skip

    def filled(self, body: Any) -> Any:
        """A request's JSON with the model's own settings where it says nothing."""
        if not self.defaults or not isinstance(body, dict):
            return body
        return {**self.defaults, **{name: value for name, value in body.items() if value is not None}}

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.engine.tokenizer

    @property
    def row_bytes(self) -> int:
        """Of one row, as it is kept: the cache, and how often every token of the vocabulary was used."""
        return BoundedReader(self.engine.prepared).form.nbytes

    @property
    def cache_size(self) -> int:
        """The most entries that a row's cache may hold."""
        return self.sizes.cache_size

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Sets its mesh, for the thread that makes its rows."""
        return contextlib.nullcontext() if self.mesh.empty else jax.set_mesh(self.mesh)

    def zones(self, use: CacheUse) -> Zones:
        """Of what a row of slots holds."""
        sinks, kept = min(use.seen, self.sizes.num_sinks), use.kept or 0
        return Zones(sinks, kept, use.held - sinks - kept)

    def chat_ids(
        self,
        messages: tuple[Message, ...],
        variables: Mapping[str, Any] | None = None,
        *,
        continues: bool = False,
        tools: tuple[dict[str, Any], ...] = (),
    ) -> list[int]:
        """A conversation up to where the next answer begins; names of control tokens in it are plain text.

        Args:
          messages: of which there is one at least.
          variables: what the template may name (`ChatTemplate.with_variables`), on top of the server's own.
          continues: whether the last message is the beginning of that answer: it stands behind what the model saw
            before it wrote that, and nothing ends it.
          tools: that the template tells the model of.

        Raises ApiError: the model's template refuses it, or has no room for tools; or variables that cannot be, or
        without a template.
        """
        self._check_tools(messages, tools)
        variables = {**(variables or {}), **({"tools": list(tools)} if tools else {})}
        with naming("messages"):
            return self._chat_ids(messages, variables, continues)

    def _chat_ids(
        self, messages: tuple[Message, ...], variables: Mapping[str, Any] | None, continues: bool
    ) -> list[int]:
        if continues:
            before = self._chat_ids(messages[:-1], variables, False)
            return [*before, *encode_behind(self.tokenizer, messages[-1].content, control_tokens=False)]
        if self.template is not None:
            found = [message.for_template() for message in messages]
            with naming("chat_template_kwargs"):
                template = self.template.with_variables(variables or {})
            return template.encode(self.tokenizer, found, control_tokens=False, encode=self.encoded.encode)
        if variables:
            message = "chat_template_kwargs do nothing here: the model has no chat template; leave them out"
            raise ApiError(400, message, param="chat_template_kwargs", code="invalid_value")
        return self.form.whole(self.tokenizer, [(message.role, message.content) for message in messages])

    def _check_tools(self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]) -> None:
        """Raises ApiError for what of tools the template would leave out without a word."""
        asked = [("tools", "tools")] if tools else []
        asked += [("calls", f"messages[{i}].tool_calls") for i, message in enumerate(messages) if message.tool_calls]
        asked += [("results", f"messages[{i}].role") for i, message in enumerate(messages) if message.role == "tool"]
        for what, param in asked:
            if self.template is None or not getattr(written(self.template), what):
                why = "there is no chat template to write" if self.template is None else "the chat template leaves out"
                message = f"{why} {param} with this model; say it in the content of a message"
                raise ApiError(400, message, param=param, code="unsupported")

    def check_calls(self) -> None:
        """Raises ApiError where calls in an answer would not be found (`sepjax.hub.tool_calls.CallFinder`)."""
        if self.template is None or not written(self.template).tagged:
            message = (
                "calls of this model are not found in its answers, since its chat template does not write them between "
                '<tool_call> and </tool_call>; with tool_choice="none" they come as text'
            )
            raise ApiError(400, message, param="tools", code="unsupported")

    def prompt_ids(self, prompt: str | tuple[int, ...], param: str = "prompt") -> list[int]:
        """Of a completion: BOS goes in front of texts as the model's makers have it; ids are taken as they are.

        Raises ApiError for no tokens, or ids outside the vocabulary. `param`: the field that it is from.
        """
        with naming(param):
            return encode_prompts(self.tokenizer, [prompt])[0]

    def text_of(self, ids: tuple[int, ...]) -> str:
        """Their text; raises ApiError for ids outside the vocabulary."""
        return self.tokenizer.decode(self.prompt_ids(ids, "tokens")) if ids else ""

    def check_prompt(self, ids: list[int], param: str) -> Int32[np.ndarray, "T"]:
        """The ids as an array; raises ApiError for more than are allowed. `param`: the field that they are from."""
        if self.max_prompt_tokens and len(ids) > self.max_prompt_tokens:
            raise ApiError(
                413, f"the prompt has {len(ids)} tokens; this server takes up to {self.max_prompt_tokens} "
                "(--max_prompt_tokens)", param=param, code="prompt_too_long",
            )  # fmt: skip
        return np.array(ids, np.int32)

    def ends(self, wanted: Wanted, *, is_chat: bool) -> dict[str, list[Any]]:
        """`stop` and `stop_token_ids` of an answer: those that are asked for, and what ends one of a conversation."""
        chat = is_chat and not wanted.ignore_eos
        given = {"stop": wanted.stop, "stop_token_ids": wanted.stop_token_ids}
        return (self.turn_ends if chat else TurnEnds()).beside(given)

    def request(self, wanted: Wanted, *, choice: int, seed: int, is_chat: bool, most: int) -> SlotRequest:
        """What slots are asked for, but for its prompt.

        Args:
          wanted: the client's settings.
          choice: number of the answer among those of one HTTP request.
          seed: of the first choice.
          is_chat: whether what ends an answer of a conversation ends it.
          most: tokens of an answer where the client says nothing.

        Raises ApiError: settings that the model cannot have.
        """
        most = wanted.max_tokens or most
        if wanted.min_tokens > most:
            raise wrong("min_tokens", wanted.min_tokens, f"at most as many as max_tokens, which is {most}")
        settings: dict[str, Any] = {
            "max_new_tokens": most,
            "min_new_tokens": wanted.min_tokens,
            **self.ends(wanted, is_chat=is_chat),
            "stop_at_eos": not wanted.ignore_eos,
            "logprobs": wanted.logprobs is not None,
            "top_logprobs": wanted.logprobs or 0,
        }
        # Checked here, or it would fail where nobody can answer. What has a range of its own was checked before.
        with naming("stop_token_ids"):
            Ends.create(self.tokenizer, False, wanted.stop_token_ids)
        with naming("top_logprobs" if is_chat else "logprobs"):
            RowSettings.create(self.tokenizer, **settings)
        with naming("logit_bias"):
            sampling = Sampling.create(
                wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p, presence_penalty=wanted.presence_penalty,
                frequency_penalty=wanted.frequency_penalty, repetition_penalty=wanted.repetition_penalty,
                logit_bias=dict(wanted.logit_bias),
            ).check(self.tokenizer.vocab_size)  # fmt: skip
        return SlotRequest(None, sampling=sampling, seed=(seed + choice) % 2**32, keep=True, undrawn=True, **settings)

    def token_text(self, token: int) -> str:
        """A token as logprobs show it: its text, a control token's name, or its bytes where they are no text."""
        data = self.tokenizer.token_bytes(token)
        if not data:
            return self.control_names.get(token, "")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def seed_of(wanted: Wanted) -> int:
    """The client's, or one that nobody can guess."""
    return secrets.randbits(32) if wanted.seed is None else wanted.seed


def fingerprint(engine: Generator) -> str:
    """Tells models apart whose caches have one shape: of all bits of the weights, and of what decides what is kept."""
    found = hashlib.blake2b(digest_size=16)
    for marks in marks_of(engine.prepared.params):
        found.update(marks)
    settings = [told(x) for x in (engine.kept, engine.prepared.config, BoundedReader(engine.prepared).sizes)]
    found.update(json.dumps(settings, sort_keys=True).encode())
    return found.hexdigest()
