"""What clients may ask for: OpenAI's fields and a few more, as tables, read into frozen dataclasses."""

import dataclasses
import json
from typing import Any

from sepjax.serve.errors import ApiError
from sepjax.serve.fields import (
    Field,
    biases,
    flag,
    mapping,
    number,
    read,
    strict_json,
    text,
    texts,
    token_ids,
    whole,
    wrong,
)
from sepjax.serve.messages import Message, read_messages, read_tools

MOST_CHOICES = 128  # `n`, and prompts of one request
MOST_TOKENS = 2**31 - 1
MOST_IN_ONE_PIECE = 2**20  # tokens of an answer that is not streamed: it is held until its end
MOST_TOP = 20  # alternatives to a token, in logprobs
_MOST_STOPS = 16
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_cache")

# Name -> its values that ask for nothing. null never does, and [] and {} do not where there are such values. Beside
# OpenAI's fields those of vLLM, which its clients write at their defaults.
_REFUSED_EVERYWHERE: dict[str, tuple[Any, ...] | None] = {
    "store": (False,), "service_tier": ("auto", "default"), "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "use_beam_search": (False,), "length_penalty": (1,), "priority": (0,), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,), "truncate_prompt_tokens": (-1,), "prompt_logprobs": (),
    "allowed_token_ids": (), "bad_words": (), "logits_processors": (), "structured_outputs": (), "guided_json": None,
    "guided_regex": (), "guided_choice": (), "guided_grammar": (), "guided_decoding_backend": (),
    "guided_whitespace_pattern": (), "request_id": (), "cache_salt": (), "kv_transfer_params": (), "vllm_xargs": (),
}  # fmt: skip
_REFUSED_IN_CHATS = _REFUSED_EVERYWHERE | {
    "functions": (),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "web_search_options": None, "echo": (False,),
    "best_of": (1,), "add_special_tokens": (False,), "include_reasoning": (True,), "chat_template": (),
    "documents": (), "mm_processor_kwargs": (),
}  # fmt: skip
_REFUSED_IN_COMPLETIONS = _REFUSED_EVERYWHERE | {"echo": (False,), "suffix": ("",), "add_special_tokens": (True,)}


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    known = {option: Field(flag, False) for option in _STREAM_OPTIONS}
    return read(value, known, {"include_obfuscation": (False,)}, f"{name}.")


# Remarks of clients that change no answer: their own labels, and hints for a cache of prompts that needs none here.
_NOTES = {
    "metadata": Field(mapping), "prompt_cache_key": Field(text), "prompt_cache_retention": Field(text),
}  # fmt: skip
_EVERYWHERE = {
    "model": Field(text),
    "max_tokens": Field(whole(1, MOST_TOKENS)),
    "min_tokens": Field(whole(0, MOST_TOKENS), 0),
    "temperature": Field(number(0.0), 1.0),
    "top_p": Field(number(0.0, 1.0, above=True), 1.0),
    "top_k": Field(whole(-1, MOST_TOKENS), 0),  # -1 is 0, all tokens, as others write it
    "min_p": Field(number(0.0, 1.0), 0.0),
    "presence_penalty": Field(number(-2.0, 2.0), 0.0),
    "frequency_penalty": Field(number(-2.0, 2.0), 0.0),
    "repetition_penalty": Field(number(1e-3, 1e3), 1.0),
    "logit_bias": Field(biases, ()),
    "n": Field(whole(1, MOST_CHOICES), 1),
    "stop": Field(texts(_MOST_STOPS), ()),
    "stop_token_ids": Field(token_ids, ()),
    "seed": Field(whole(-(2**63), 2**63 - 1)),
    "ignore_eos": Field(flag, False),
    "stream": Field(flag, False),
    "stream_options": Field(_stream_options),
    "user": Field(text, ""),
    "safety_identifier": Field(text, ""),
    **_NOTES,
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What both kinds of requests may say."""

    model: str | None
    max_tokens: int | None
    min_tokens: int  # before which no end token and no stop text ends an answer
    temperature: float
    top_p: float
    top_k: int  # 0: all
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]  # (token, what is added to its score)
    n: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    seed: int | None  # of the first choice; the next have the next ones. 0 to 2^32 - 1
    ignore_eos: bool
    logprobs: int | None  # alternatives to each token; None: no log-probabilities at all
    stream: bool
    include_usage: bool  # in a chunk of its own, the last
    continuous_usage_stats: bool  # in every chunk
    include_cache: bool  # what the cache holds, in every chunk
    user: str


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """`POST /v1/chat/completions`."""

    wanted: Wanted
    messages: tuple[Message, ...]
    template_variables: dict[str, Any] = dataclasses.field(default_factory=dict)  # "chat_template_kwargs"
    continues: bool = False  # whether the last message is an answer to go on with ("continue_final_message")
    tools: tuple[dict[str, Any], ...] = ()  # that the template tells the model of
    finds_calls: bool = False  # whether calls of them are looked for in the answer


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """`POST /v1/completions`."""

    wanted: Wanted
    prompts: tuple[str | tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class TokenizeRequest:
    """`POST /tokenize`: a text, or messages as a chat has them."""

    model: str | None
    prompt: str | None
    messages: tuple[Message, ...] | None
    add_special_tokens: bool
    template_variables: dict[str, Any] = dataclasses.field(default_factory=dict)  # "chat_template_kwargs"
    tools: tuple[dict[str, Any], ...] = ()  # as of a chat


@dataclasses.dataclass(frozen=True)
class DetokenizeRequest:
    """`POST /detokenize`."""

    model: str | None
    tokens: tuple[int, ...]


def load_json(body: bytes) -> Any:
    """Raises ApiError for what is not JSON."""
    try:
        return strict_json(body)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, f"the body is not valid JSON: {said}", code="invalid_json") from None


def chat_request(body: Any) -> ChatRequest:
    """Raises ApiError."""
    own = {
        "messages": Field(read_messages),
        "chat_template_kwargs": Field(mapping, {}),
        "max_completion_tokens": Field(whole(1, MOST_TOKENS)),
        "continue_final_message": Field(flag, False),
        "add_generation_prompt": Field(flag),
        "logprobs": Field(flag, False),
        "top_logprobs": Field(whole(0, MOST_TOP)),
        "tools": Field(read_tools, ()),
        "tool_choice": Field(_tool_choice, "auto"),
        "parallel_tool_calls": Field(flag, True),
    }
    values = read(body, _EVERYWHERE | own, _REFUSED_IN_CHATS)
    tools = _tools(values.pop("tools"), values.pop("parallel_tool_calls"), values["chat_template_kwargs"])
    finds_calls = values.pop("tool_choice") == "auto" and bool(tools)
    messages, most = _given(values, "messages"), values.pop("max_completion_tokens")
    variables = values.pop("chat_template_kwargs")
    if most is not None and values["max_tokens"] not in (None, most):
        raise wrong("max_tokens", values["max_tokens"], "left out beside max_completion_tokens, or equal to it")
    values["max_tokens"] = values["max_tokens"] if most is None else most
    asked, alternatives = values.pop("logprobs"), values.pop("top_logprobs")
    if alternatives and not asked:
        raise wrong("top_logprobs", alternatives, "left out, or come with logprobs=true")
    continues = _continues(values.pop("continue_final_message"), values.pop("add_generation_prompt"), messages)
    wanted = _wanted(values, (alternatives or 0) if asked else None)
    return ChatRequest(wanted, messages, variables, continues, tools, finds_calls)


def _tools(found: tuple[dict[str, Any], ...], parallel: bool, variables: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Checks them against what else says something of tools."""
    if found and not parallel:
        raise wrong("parallel_tool_calls", False, "left out, or true: how many calls an answer has, the model decides")
    if found and "tools" in variables:
        raise wrong("chat_template_kwargs.tools", variables["tools"], "left out beside tools")
    return found


def _tool_choice(name: str, value: Any) -> str:
    if value not in ("auto", "none"):
        raise wrong(name, value, '"auto" or "none": no answer is forced to be a call')
    return value


def _continues(continues: bool, prompts: bool | None, messages: tuple[Message, ...]) -> bool:
    """Checks the two against one another (both are needed elsewhere; here the second says nothing new)."""
    if prompts is not None and prompts == continues:
        raise wrong("add_generation_prompt", prompts, f"left out, or {json.dumps(not continues)}: the opposite of "
                    "continue_final_message")  # fmt: skip
    last = messages[-1]
    plain = last.content and last.reasoning_content is None and not last.tool_calls
    is_answer = len(messages) > 1 and last.role == "assistant" and plain
    if continues and not is_answer:
        raise wrong("continue_final_message", True, "left out where the last message is not an answer's content behind "
                    "other messages")  # fmt: skip
    return continues


def completion_request(body: Any) -> CompletionRequest:
    """Raises ApiError. OpenAI's default of 16 tokens holds here."""
    own = {
        "prompt": Field(_prompts),
        "logprobs": Field(whole(0, MOST_TOP)),
        "best_of": Field(whole(1, MOST_CHOICES)),
    }
    values = read(body, _EVERYWHERE | own, _REFUSED_IN_COMPLETIONS)
    best = values.pop("best_of")
    if best not in (None, values["n"]):
        message = f"best_of={best} is not supported by this server beside n={values['n']}"
        raise ApiError(400, message, param="best_of", code="unsupported")
    prompts, logprobs = _given(values, "prompt"), values.pop("logprobs")
    if len(prompts) * values["n"] > MOST_CHOICES:
        raise wrong("n", values["n"], f"so small that {len(prompts)} prompts make up to {MOST_CHOICES} choices")
    values["max_tokens"] = values["max_tokens"] or 16
    return CompletionRequest(_wanted(values, logprobs), prompts)


def tokenize_request(body: Any) -> TokenizeRequest:
    """Raises ApiError."""
    known = {
        "model": Field(text),
        "prompt": Field(text),
        "messages": Field(read_messages),
        "add_special_tokens": Field(flag),
        "chat_template_kwargs": Field(mapping, {}),
        "tools": Field(read_tools, ()),
    }
    values = read(body, known, {})
    if (values["prompt"] is None) == (values["messages"] is None):
        raise ApiError(400, "give prompt or messages, one of them", param="prompt", code="invalid_value")
    special = values["add_special_tokens"]
    if special is not None and values["messages"] is not None:
        raise wrong("add_special_tokens", special, "left out beside messages, which have those of their template")
    variables = values["chat_template_kwargs"]
    if variables and values["messages"] is None:
        raise wrong("chat_template_kwargs", variables, "left out beside prompt, which goes into no template")
    if values["tools"] and values["messages"] is None:
        raise wrong("tools", list(values["tools"]), "left out beside prompt, which goes into no template")
    tools = _tools(values["tools"], True, variables)
    return TokenizeRequest(
        values["model"], values["prompt"], values["messages"], special is not False, variables, tools
    )


def detokenize_request(body: Any) -> DetokenizeRequest:
    """Raises ApiError."""
    values = read(body, {"model": Field(text), "tokens": Field(token_ids)}, {})
    return DetokenizeRequest(values["model"], _given(values, "tokens"))


def _given(values: dict[str, Any], name: str) -> Any:
    value = values.pop(name)
    if value is None:
        raise ApiError(400, f"{name} is missing", param=name, code="missing_field")
    return value


def _wanted(values: dict[str, Any], logprobs: int | None) -> Wanted:
    options: dict[str, Any] = values.pop("stream_options") or dict.fromkeys(_STREAM_OPTIONS, False)
    if any(options.values()) and not values["stream"]:
        asked = {name: True for name, value in options.items() if value}
        raise wrong("stream_options", asked, "left out without stream=true")
    most = values["max_tokens"]
    if not values["stream"] and most is not None and most > MOST_IN_ONE_PIECE:
        raise wrong("max_tokens", most, f"at most {MOST_IN_ONE_PIECE} for an answer in one piece; use stream=true")
    values["top_k"] = max(0, values["top_k"])
    values["seed"] = None if values["seed"] is None else values["seed"] % 2**32
    user = values.pop("user") or values.pop("safety_identifier")  # which is the newer name
    told = {name: value for name, value in values.items() if name not in (*_NOTES, "safety_identifier")}
    return Wanted(**told, **options, user=user, logprobs=logprobs)


def _prompts(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, token ids, or a list of either: always a list."""
    if isinstance(value, str):
        return (value,)
    expected = f"a string, a list of token ids, or a list of up to {MOST_CHOICES} of either"
    if not isinstance(value, list) or not value:
        raise wrong(name, value, expected)
    if all(type(i) is int for i in value):
        return (token_ids(name, value),)
    if len(value) > MOST_CHOICES:
        raise wrong(name, value, expected)
    return tuple(x if isinstance(x, str) else token_ids(f"{name}[{i}]", x) for i, x in enumerate(value))
