"""What the user asks of generation, checked and made arrays."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Int32
from sepjax.config import (
    AttentionConfig,
    ConfigError,
    ModelConfig,
    UserError,
    keeps_everything,
    layer_windows,
    whole_number,
)
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.cache.sizes import bucket
from sepjax.generation.sampling import Sampling
from sepjax.separators import flag_separators

Prompt = str | Sequence[int]
_PLAIN = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_PLAIN_DRAW = _PLAIN | {"temperature": 1.0, "top_k": 50}  # what transformers draws with where a file says no more
# What changes the scores, of the best token too.
_CHANGES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": None}


class PromptError(UserError, ValueError):
    """A prompt that nothing can be generated from: the message says which, and why."""


def encode_prompts(tokenizer: Tokenizer, prompts: Any, *, control_tokens: bool = True) -> list[list[int]]:
    """Token ids of one text, or of a list whose items are texts or lists of token ids.

    Texts get BOS in front where the model's own tokenizer puts it, but not twice; token ids are taken as they are.
    See `Tokenizer.encode` for `control_tokens`.

    Raises:
      TypeError: something else than that.
      PromptError: no prompts, a prompt of no tokens, or an id outside the vocabulary.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = _on_host(prompts)
    if not _is_list(prompts):
        raise TypeError(f"prompts must be a text or a list of prompts, got {type(prompts).__name__}")
    if not len(prompts):
        raise PromptError("prompts is an empty list; give at least one")
    return [_encode(tokenizer, number, prompt, control_tokens) for number, prompt in enumerate(prompts)]


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) or (isinstance(given, np.ndarray) and given.ndim > 0)


def _on_host(given: Any) -> Any:
    """An array of JAX as one of NumPy; anything else as it is."""
    return np.asarray(given) if isinstance(given, jax.Array) else given


def _encode(tokenizer: Tokenizer, number: int, prompt: Any, control_tokens: bool) -> list[int]:
    prompt = _on_host(prompt)
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, bos=True, control_tokens=control_tokens)
    elif _is_list(prompt) and not isinstance(prompt, bytes):
        plain = isinstance(prompt, list | tuple) and set(map(type, prompt)) <= {int}  # many times faster than each
        ids = list(prompt) if plain else [_id(number, i) for i in prompt]
    else:
        hint = "; the ids of one prompt go in a list of their own: [[1, 2, 3]]" if hasattr(prompt, "__index__") else ""
        raise TypeError(f"prompt {number} must be a text or a list of token ids, got {type(prompt).__name__}{hint}")
    if not ids:
        missing = " and the tokenizer puts no BOS token in front" if isinstance(prompt, str) else ""
        raise PromptError(f"prompt {number} has no tokens{missing}; give it at least one")
    if min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
        outside = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
        raise PromptError(
            f"prompt {number} has token ids outside the vocabulary of {tokenizer.vocab_size} tokens: {outside[:5]}"
        )
    return ids


def _id(number: int, i: Any) -> int:
    try:
        return operator.index(_on_host(i))
    except TypeError:
        kind = type(i).__name__
        raise TypeError(
            f"prompt {number} has {i!r:.40} among its token ids, a {kind}; they are whole numbers"
        ) from None


def choose_sampling(tokenizer: Tokenizer, sampling_defaults: bool, **given: Any) -> Sampling:
    """How to draw: what is given; else, if asked for, what generation_config.json says; else the best token.

    Args:
      tokenizer: the model's, which has read that file.
      sampling_defaults: whether its settings are asked for.
      **given: what `Sampling.create` takes; None: not given.

    Raises:
      ConfigError: settings out of range or without effect; there is no such file, or it has values of another kind.
    """
    defaults = _PLAIN | _CHANGES | (_theirs(tokenizer.special.sampling) if sampling_defaults else {})
    chosen: dict[str, Any] = defaults | {name: value for name, value in given.items() if value is not None}
    sampling = Sampling.create(**chosen)
    if chosen["temperature"] == 0:  # what is given and would change nothing is a mistake; all of the tokens are not
        idle = [name for name in _PLAIN if given.get(name) not in (None, _PLAIN[name])]
        if idle:
            raise ConfigError(
                f"{idle[0]}={given[idle[0]]} does nothing where the best token is always taken; set temperature, for "
                "example to 1, or leave it out"
            )
    return sampling


def recommended_sampling(tokenizer: Tokenizer) -> dict[str, float]:
    """What generation_config.json says, by name: `choose_sampling` where nothing else is given. Raises as that does."""
    choose_sampling(tokenizer, True)
    return _PLAIN | {"repetition_penalty": 1.0} | _theirs(tokenizer.special.sampling)


def _theirs(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json says."""
    if not said:
        raise ConfigError("the model has no generation_config.json with settings; leave out sampling_defaults")
    found = dict(_PLAIN_DRAW) if said.get("do_sample") else {}
    # If it does not draw it takes the best token, whatever else it says; of the penalised scores, too.
    for name in (*(_PLAIN if found else ()), "repetition_penalty"):
        value, kind = said.get(name), type((_PLAIN | _CHANGES)[name])
        if value is not None and type(value) not in (int, kind):
            raise ConfigError(f"generation_config.json has {name}={str(value)[:80]!r}, expected {kind.__name__}")
        found |= {} if value is None else {name: kind(value)}
    return found


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B"]]:
    """Right-padded token ids, T in a bucket so that prompts of other lengths need no other program; and the lengths."""
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


def cache_sizes(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None,
    table: np.ndarray,
    attention: AttentionConfig,
    num_layers: int,
) -> dict[str, int]:
    """`window_size` and `capacity` of the cache for these prompts; None: without end.

    The window is the largest of any layer, or the whole length where that is shorter: then nothing is evicted. The
    capacity has room for the prompts' global tokens and for one new token in four being global; it grows if need be.
    """
    longest = max(map(len, prompts))
    total = bucket(longest + (max_new_tokens or 0))
    windows = layer_windows(attention, num_layers, total)
    window_size = max(windows) if max_new_tokens is None else min(max(windows), total)
    capacity = max(count_global(ids[:-window_size], table, attention) for ids in prompts)
    if max_new_tokens is None:
        capacity += 64
    else:
        capacity = min(capacity + max_new_tokens // 4, total - window_size)
    return {"window_size": window_size, "capacity": bucket(capacity)}


def count_global(ids: Sequence[int], table: np.ndarray, attention: AttentionConfig) -> int:
    """How many of the first tokens of a text stay visible for ever; with a gate, the most that can."""
    if attention.pattern == "gated":
        return attention.num_sinks + attention.gate_keep * -(-len(ids) // attention.gate_stretch)
    positions = np.arange(len(ids))
    is_separator = flag_separators(np.array(ids, np.int32), positions, table, attention)
    return int(np.sum(is_separator | (positions < attention.num_sinks)))


def grouped(prompts: Sequence[Sequence[int]], batch_size: int | None) -> list[list[int]]:
    """Which prompts are answered together, by their numbers: of like length, the longest first; None: all as they come.

    All groups are of one size, which is one program: as small as their number allows (33 prompts in groups of up to 32
    are two of 24), and the last one has some of its prompts again where there are not enough.

    Raises ConfigError for a size that is no number of 1 or more.
    """
    total = len(prompts)
    most = total if batch_size is None else whole_number("batch_size", batch_size, 1)
    if most >= total:
        return [list(range(total))]
    step = math.gcd(most, 8)  # rows may be divided over devices
    size = -(-total // (-(-total // most)))
    size = -(-size // step) * step
    order = sorted(range(total), key=lambda i: -len(prompts[i]))
    groups = [order[first : first + size] for first in range(0, total, size)]
    return [(group * size)[:size] for group in groups]


def row_keys(seed: int | Sequence[int] | jax.Array, num_rows: int) -> jax.Array:
    """A typed PRNG key a row: fold_in(key(seed), row), or of a seed a row fold_in(key(seed), 0); or those given.

    So a row of a batch with seeds of its own draws what it would draw alone.

    Raises:
      ConfigError: not one seed, nor as many as rows, or one outside 0 to 2^32 - 1.
    """
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        if seed.shape != (num_rows,):
            raise ConfigError(f"seed has typed keys of shape {seed.shape}, expected one a prompt: ({num_rows},)")
        return seed
    given = _on_host(seed)
    if _is_list(given) and not isinstance(given, (str, bytes)):
        seeds, rows = list(given), np.zeros(num_rows, np.uint32)
    else:
        seeds, rows = [given] * num_rows, np.arange(num_rows, dtype=np.uint32)
    if len(seeds) != num_rows:
        raise ConfigError(f"seed must be one number or one a prompt: got {len(seeds)} seeds for {num_rows} prompts")
    return _fold(np.array(checked_seeds(seeds), np.uint32), rows)


def checked_seeds(seeds: Sequence[Any]) -> list[int]:
    """Seeds as ints; raises ConfigError for what is not a whole number from 0 to 2^32 - 1."""
    return [whole_number("seed", seed, most=2**32 - 1) for seed in seeds]


@jax.jit
def _fold(seeds: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds, rows)


def check_length(config: ModelConfig, longest: int, max_new_tokens: int | None, attention: AttentionConfig) -> None:
    """Raises ConfigError for lengths that the model or a growing cache cannot have.

    Args:
      config: of the model.
      longest: tokens of the longest prompt.
      max_new_tokens: None: without end.
      attention: the pattern.
    """
    if max_new_tokens is None and keeps_everything(attention):
        raise ConfigError(
            'pattern="dense" keeps every token, so a stream without end would need a cache without end; set '
            "max_new_tokens, or use a pattern that evicts"
        )
    if config.position_embedding != "learned":
        return
    rows = config.max_positions
    if max_new_tokens is None or longest + max_new_tokens - 1 > rows:
        length = "a stream without end" if max_new_tokens is None else f"{longest} prompt + {max_new_tokens} new tokens"
        raise ConfigError(
            f"{length} would pass the {rows} learned positions of the model (model.max_positions); set max_new_tokens "
            f"to {max(0, rows + 1 - longest)} or less, or shorten the prompt"
        )


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ConfigError for a tokenizer with ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {config.vocab_size} embeddings; "
            "they do not belong together: load both from the same folder"
        )
