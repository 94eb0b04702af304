"""What `sepjax generate`, `chat` and `serve` share: settings, and what follows from them once the model is there."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

from sepjax.command.settings import AtLeast, OneOf, Repeated
from sepjax.config import BOUNDED_PATTERNS, CACHE_DTYPES, ConfigError, under
from sepjax.programs.common import Loading, check_arm, one_arm, refuse_separators, refuse_window

if TYPE_CHECKING:
    from sepjax.config import AttentionConfig
    from sepjax.data.tokenizer import Tokenizer
    from sepjax.generation.prompts import Prompt
    from sepjax.hub.chat_template import ChatTemplate
    from sepjax.model.transformer import Transformer

MAX_REPEATS = 12
_SIZES = ("window_size", "num_sinks", "max_separators", "cache_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounded(Loading):
    """Over which cache. Bounded ones keep what is stored with the model (docs/keeping.md) unless a flag says more."""

    # attention pattern; default: as in training. This flag and the next four override what is stored with the model
    pattern: Annotated[str, OneOf(BOUNDED_PATTERNS)] | None = None
    window_size: int | None = None  # n, the local window of every layer; default: as in training
    num_sinks: int | None = None  # first tokens, always visible; default: as in training
    max_separators: int | None = None  # s, separators (or other kept tokens) in a bounded cache; default: the config's
    cache_size: int | None = None  # c, entries of a bounded cache; default: the config's
    # dtype of cached keys and values: the model's, or int8 in nearly half the bytes; default: the config's, or --arm's
    cache_dtype: Annotated[str, OneOf(CACHE_DTYPES)] | None = None
    # all of these in one: a pattern, then a=, s=, w=, c=, ..., as in --arms of sepjax evaluate. @FILE reads a file;
    # @smollm2_800 (default of smollm2-135m) and @smollm2_324 are the best settings for SmolLM2-135M
    arm: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arm and len(self.told) > 1:
            raise ConfigError(f"--{self.told[0]} and --arm both say what is kept; give one of them")
        check_arm(self.arm)
        refuse_window(self.pattern, self.sizes)
        refuse_separators(self.pattern, self.max_separators)

    @property
    def sizes(self) -> list[str]:
        """The flags given that mean nothing to a dense pattern."""
        return [name for name in ("num_sinks", "window_size") if getattr(self, name) is not None]

    @property
    def told(self) -> list[str]:
        """The flags given that say what is kept: with one of them nothing of what is stored with the model counts."""
        return [name for name in ("pattern", *_SIZES, "arm") if getattr(self, name) not in (None, "")]

    @property
    def bounded(self) -> bool:
        """Whether the settings ask for a bounded cache."""
        return True

    def attention(self, model: "Transformer") -> "AttentionConfig":
        """What the flags make of the model's own; without flags what bounded caches of it keep."""
        changes: dict[str, Any] = {} if self.cache_dtype is None else {"cache_dtype": self.cache_dtype}
        if not self.told:
            return dataclasses.replace(self._untold(model), **changes)
        if self.arm:
            return dataclasses.replace(one_arm(self.arm, model.attention, model.config.num_layers), **changes)
        if self.window_size is not None:
            changes |= {"window_size": self.window_size, "layer_windows": ()}
        for name in ("num_sinks", "max_separators", "cache_size"):
            changes |= {} if getattr(self, name) is None else {name: getattr(self, name)}
        attention = under(model.attention, self.pattern or model.attention.pattern, **changes)
        refuse_window(attention.pattern, self.sizes)  # the model may be dense itself, or a window
        refuse_separators(attention.pattern, self.max_separators)
        return attention

    def _untold(self, model: "Transformer") -> "AttentionConfig":
        return model.kept if self.bounded and model.kept is not None else model.attention

    def kept_in_words(self, model: "Transformer") -> str:
        """A line on what the bounded cache keeps, why, and how to have another; none for one that grows."""
        from sepjax.programs.kept_line import kept_line

        is_bounded = self.bounded or self.attention(model).pattern == "watched"
        return kept_line(self, model) if is_bounded and not self.quiet else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversing(Bounded):
    """How conversations are written."""

    # JSON object of variables for the model's chat template (see its card), like '{"enable_thinking": false}'
    template_variables: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.variables  # raises what it raises

    @property
    def variables(self) -> dict[str, Any]:
        """What --template_variables has; raises ConfigError where that is not a JSON object."""
        if self.template_variables is None:
            return {}
        try:
            found = json.loads(self.template_variables)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--template_variables={self.template_variables[:80]} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"--template_variables={self.template_variables[:80]} must be a JSON object")
        return found

    def template(self, tokenizer: "Tokenizer") -> "ChatTemplate | None":
        """The model's, with the variables; raises ConfigError where it has none for them."""
        from sepjax.hub.chat_template import ChatTemplate
        from sepjax.loading import locate

        found = ChatTemplate.of_model(locate(self.path), tokenizer)
        if self.template_variables is None or found is not None:
            return found and found.with_variables(self.variables)
        raise ConfigError(
            f"--template_variables does nothing for {str(self.path)!r}, which has no chat template; leave it out"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing(Conversing):
    """How text is made, and over which cache."""

    # maximum tokens of an answer; default: 128, in streams and chats no limit
    max_new_tokens: Annotated[int, AtLeast(1)] | None = None
    # minimum tokens before an end token, --stop_token_ids or --stop can end an answer; default: 0
    min_new_tokens: Annotated[int | None, AtLeast(0)] = None
    temperature: float | None = None  # 0, the default: greedy; above 0: sample
    top_k: int | None = None  # sample from the k most probable tokens; 0, the default: all
    top_p: float | None = None  # sample from the fewest tokens that reach this probability; default: 1, all
    min_p: float | None = None  # sample from tokens at least this fraction as probable as the best; default: 0, all
    # subtracted from the logits of tokens already generated in this answer: -2 to 2; default: 0, none
    presence_penalty: float | None = None
    # the same, once per occurrence: -2 to 2; default: 0, none
    frequency_penalty: float | None = None
    # divides positive and multiplies negative logits of tokens in prompt or answer; default: 1, none
    repetition_penalty: float | None = None
    # use the sampling settings that the model's own files recommend, where none is given
    sampling_defaults: bool = False
    seed: int | None = None  # seed of sampling; default: 0
    stop: Annotated[tuple[str, ...], Repeated()] = ()  # string that ends an answer
    stop_token_ids: Annotated[tuple[int, ...], AtLeast(0)] = ()  # token ids that end an answer, besides the model's own
    # read names of control tokens in your texts as control tokens; default: not in chats
    control_tokens: bool | None = None
    resume: str | None = None  # folder of a saved stream or conversation to continue
    # end a stream that repeats a sequence of tokens more often than this in a row; 0: never; default: 12
    max_repeats: Annotated[int, AtLeast(0)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        draws = [name for name in ("min_p", "seed", "top_k", "top_p") if getattr(self, name) is not None]
        if draws and not self.temperature and not self.sampling_defaults:
            raise ConfigError(
                f"--{draws[0]} does nothing where the best token is always taken; add --temperature=1, or leave it out"
            )

    def _untold(self, model: "Transformer") -> "AttentionConfig":
        if self.resume is None:
            return super()._untold(model)
        from sepjax.generation.saved import attention_of

        return attention_of(self.resume, model.attention, model.kept)

    def check_resume(self) -> None:
        """Raises what is wrong with the folder of --resume, before a model is loaded for it."""
        from sepjax.generation.saved import read

        if self.resume is not None:
            read(self.resume)

    def options(self, tokenizer: "Tokenizer") -> dict[str, Any]:
        """Arguments of `sepjax.Generator.generate` and `stream`: how text is drawn, and what ends it."""
        from sepjax.generation.prompts import choose_sampling

        names = (
            "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        return {
            "sampling": choose_sampling(tokenizer, self.sampling_defaults, **given),
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "min_new_tokens": self.min_new_tokens or 0,
            "seed": self.seed or 0,
        }

    def endless(self) -> dict[str, Any]:
        """Further arguments of `sepjax.Generator.stream`, for a bounded cache."""
        repeats = MAX_REPEATS if self.max_repeats is None else self.max_repeats
        return {"bounded": True, "max_repeats": repeats, "resume": self.resume}

    def warn(
        self, model: "Transformer", tokenizer: "Tokenizer", prompts: "list[Prompt]", new: int | None
    ) -> None:  # fmt: skip
        """Lines on stderr where text or cache are longer than what the model was trained on."""
        from sepjax.generation import limits
        from sepjax.generation.prompts import encode_prompts
        from sepjax.loading import locate

        attention, trained = self.attention(model), limits.trained_length(locate(self.path), model.config)
        bounded = self.bounded or attention.pattern == "watched"
        longest = max(map(len, encode_prompts(tokenizer, prompts))) if prompts else 0
        limits.warn_of_length(model.config, attention, longest, new, trained, bounded=bounded)
        if bounded:
            limits.warn_of_cache(model.config, attention, trained)
