"""Choosing the next token from its scores.

The order is Hugging Face's: divide by the temperature, then keep the `top_k` best, of these the fewest that reach the
probability `top_p`, of these the ones at least `min_p` times as probable as the best, and draw. Equal scores are kept
or dropped together. The best token always stays. Bias and penalties come first (`sepjax.generation.penalties`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.attention.target import target
from sepjax.config import ConfigError, number, whole_number

MOST_BIASED = 300  # tokens that a request may give a bias
_INFINITE = 0x7F800000  # bits of float32's infinity
_PARTS, _FEW = 32, 4  # in which a search parts the numbers of so many rows at most; of more rows it halves them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Sampling:
    """Sampling settings, one for all rows or one per row. Traced: other values compile nothing. Made by `create`."""

    temperature: Float[jax.Array, "*B"]  # 0: greedy, the best token; then the next three do not matter
    top_k: Int32[jax.Array, "*B"]  # 0: all
    top_p: Float[jax.Array, "*B"]  # 1: all
    min_p: Float[jax.Array, "*B"]  # 0: all
    presence_penalty: Float[jax.Array, "*B"]  # 0: none
    frequency_penalty: Float[jax.Array, "*B"]  # 0: none
    repetition_penalty: Float[jax.Array, "*B"]  # 1: none
    bias_ids: Int32[jax.Array, "*B N"]  # tokens that have a bias; filled up with -1
    bias: Float[jax.Array, "*B N"]  # theirs

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True

    @classmethod
    def create(
        cls,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        *,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> "Sampling":
        """Checks the settings and converts them to arrays.

        Args:
          temperature: 0: greedy.
          top_k: sample from the k most probable tokens; 0: all.
          top_p: sample from the fewest tokens that together reach this probability; 1: all.
          min_p: sample from tokens at least this fraction as probable as the best; 0: all.
          presence_penalty: subtracted from the logits of tokens generated in this turn, as in OpenAI's API.
          frequency_penalty: the same, once per occurrence.
          repetition_penalty: divides positive and multiplies negative logits of all tokens of the text, prompt or
            generated, as in Hugging Face.
          logit_bias: added to the logits of up to 300 tokens, by id.

        Raises:
          ConfigError: temperature or top_k below 0, top_p outside (0, 1], min_p outside [0, 1], presence or frequency
            penalty outside [-2, 2], repetition_penalty outside [0.001, 1000], a bias outside [-100, 100], more than 300
            biases, or a value that is not a number.
        """
        arrays: dict[str, Any] = {"top_k": np.asarray(whole_number("top_k", top_k, about=" (all tokens)"), np.int32)}
        for name, given, fits, expected in (
            ("temperature", temperature, lambda x: 0 <= x < float("inf"), "0 (greedy) or more, and finite"),
            ("top_p", top_p, lambda x: 0 < x <= 1, "above 0 and at most 1 (all tokens)"),
            ("min_p", min_p, lambda x: 0 <= x <= 1, "between 0 (all tokens) and 1"),
            ("presence_penalty", presence_penalty, lambda x: -2 <= x <= 2, "between -2 and 2; 0: none"),
            ("frequency_penalty", frequency_penalty, lambda x: -2 <= x <= 2, "between -2 and 2; 0: none"),
            ("repetition_penalty", repetition_penalty, lambda x: 1e-3 <= x <= 1e3, "0.001 to 1000; 1: none"),
        ):
            value = number(name, given)
            if not fits(value):
                raise ConfigError(f"{name}={given} must be {expected}")
            arrays[name] = np.asarray(value, np.float32)
        arrays["bias_ids"], arrays["bias"] = _bias(logit_bias or {})
        return cls(**arrays)

    def __repr__(self) -> str:
        """What is not as `create` has it where nothing is given. Of several rows, or traced, no numbers."""
        if not all(isinstance(x, np.ndarray) for x in vars(self).values()) or np.ndim(self.temperature):
            shape = np.shape(self.temperature)
            return f"Sampling({shape[0]} rows)" if shape else "Sampling(...)"
        usual = vars(Sampling.create())
        said = [f"{name}={x:g}" for name, x in vars(self).items() if not np.ndim(x) and x != usual[name]]
        biased = int(np.sum(np.asarray(self.bias_ids) >= 0))
        return f"Sampling({', '.join([*said, *([f'logit_bias of {biased}'] if biased else [])]) or 'greedy'})"

    @classmethod
    def of_rows(cls, rows: "Sequence[Sampling]", num_rows: int) -> "Sampling":
        """Settings per row. Raises ConfigError unless there is one per row."""
        if len(rows) != num_rows:
            raise ConfigError(f"sampling must be one, or one a prompt: got {len(rows)} for {num_rows} prompts")
        return jax.tree.map(lambda *x: np.stack(x), *rows)

    def for_rows(self, rows: int) -> "Sampling":
        """The same settings with a leading axis of `rows`."""
        if jnp.ndim(self.temperature):
            return self
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *jnp.shape(x))), self)

    def is_plain(self) -> Bool[jax.Array, "*B"]:
        """Which rows are greedy, by unchanged logits."""
        penalised = (self.frequency_penalty != 0) | (self.presence_penalty != 0) | (self.repetition_penalty != 1)
        return ~(self.is_hot() | penalised | (self.bias_ids[..., 0] >= 0))

    def is_hot(self) -> Bool[jax.Array, "*B"]:
        """Which rows sample. Temperatures below the smallest normal float would be flushed to 0, a division by zero."""
        return jnp.asarray(self.temperature) >= jnp.finfo(jnp.float32).tiny

    def check(self, vocab_size: int, rows: int = 0) -> "Sampling":
        """Returns itself; raises ConfigError for a bias of a token outside the vocabulary, or a wrong number of rows.

        rows: the number of rows it may have, if it has an axis of rows; 0: it must not have one.
        """
        shape = np.shape(self.temperature)
        if shape not in ((), (rows,)):
            expected = f"{rows}, or one way for all" if rows else "one"
            raise ConfigError(f"sampling is of {shape[0]} rows, expected {expected}")
        most = int(np.max(self.bias_ids))
        if most >= vocab_size:
            raise ConfigError(f"logit_bias has {most}, which is outside the vocabulary of {vocab_size} tokens")
        return self


def _bias(given: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """`bias_ids` and `bias` of one row: the arrays of all requests have one shape, which is one program."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"logit_bias={given!r:.80} has the wrong type, expected a mapping of token ids to biases")
    if len(given) > MOST_BIASED:
        raise ConfigError(f"logit_bias has {len(given)} tokens; give {MOST_BIASED} or fewer")
    ids, bias = np.full(MOST_BIASED, -1, np.int32), np.zeros(MOST_BIASED, np.float32)
    for n, (token, value) in enumerate(given.items()):
        if not -100 <= number(f"logit_bias of token {token}", value) <= 100:
            raise ConfigError(f"logit_bias of token {token} is {value}; it must be between -100 and 100")
        ids[n], bias[n] = whole_number("a token id of logit_bias", token), value
    return ids, bias


def sample(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    sampling: Sampling,
    active: Bool[Array, "B"] | None = None,
    change: Callable[[jax.Array], jax.Array] = lambda scores: scores,
) -> Int32[jax.Array, "B"]:
    """Draws one token for each row.

    Args:
      logits: scores of the next token.
      keys: typed PRNG keys, one a row; a row's token depends on its own key and scores only.
      sampling: how to draw, all rows alike or each its own way.
      active: rows whose tokens mean something; what the others wish costs nothing. None: all.
      change: of the scores, before all else, element by element. Done where they are read: scores that a branch is
        given are written for it.
    """
    sampling = sampling.for_rows(len(logits))
    if active is not None:
        plain = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}
        wished = {name: jnp.where(active, getattr(sampling, name), x) for name, x in plain.items()}
        sampling = dataclasses.replace(sampling, **wished)
    is_hot = sampling.is_hot()

    def greedy() -> jax.Array:
        return jnp.argmax(change(jnp.asarray(logits)), axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        hot = dataclasses.replace(sampling, temperature=jnp.where(is_hot, sampling.temperature, 1.0))
        return jnp.where(is_hot, drawn_hot(logits, keys, hot, change), greedy())

    return jax.lax.cond(jnp.any(is_hot), draw, greedy)


def drawn_hot(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    sampling: Sampling,
    change: Callable[[jax.Array], jax.Array] = lambda scores: scores,
) -> Int32[jax.Array, "B"]:
    """`sample` of rows all of which have a temperature above 0."""
    scores = change(jnp.asarray(logits))
    drawn = jax.vmap(jax.random.categorical)(keys, filter_logits(scores, sampling)).astype(jnp.int32)
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    top = jnp.take_along_axis(jnp.asarray(logits), best[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isfinite(top), drawn, best)  # of scores that are no numbers, the place of one


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[jax.Array, "B V"]:
    """Scores divided by the temperature (above 0), the best token's shifted to 0, those left out at -inf."""
    sampling = jax.tree.map(lambda x: x[:, None], sampling.for_rows(len(logits)))
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    needs_sort = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
    everything = jnp.full_like(logits[:, :1], -jnp.inf)
    least = jax.lax.cond(needs_sort, lambda: _least_of_top(logits, sampling), lambda: everything)
    return jnp.where((logits >= least) & (logits >= jnp.log(sampling.min_p)), logits, -jnp.inf)


def _least_of_top(logits: Array, sampling: Sampling) -> jax.Array:
    """The lowest score, [B, 1], that top_k and top_p leave; `logits` are 0 at most. Nothing is sorted."""
    k = sampling.top_k
    least = _least(logits, lambda better: jnp.sum(better, axis=-1) < k, k > 0)
    weight = jnp.where(logits >= least, jnp.exp(logits), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)

    def in_top_p(better: jax.Array) -> jax.Array:  # `better`: tokens before this one
        return jnp.sum(jnp.where(better, weight[:, None], 0.0), axis=-1) / total < sampling.top_p

    return jnp.maximum(least, _least(logits, in_top_p, sampling.top_p < 1))


def _least(logits: Array, stay: Callable[[jax.Array], jax.Array], wanted: jax.Array) -> jax.Array:
    """The least number, [B, 1], that as a score would stay; of rows not `wanted`, [B, 1], -inf.

    `stay` is told, [B, W, V], which scores are better than each of W numbers. What is better than a higher score is
    less, and the best stays. So parting finds it, among all that float32 has from -inf to 0: these lie in the order of
    their bits, downwards. A sort of many rows takes longer, and XLA gives it to a library that cannot be part of a CUDA
    graph. Of few rows a round takes as long as it takes to start, so there the numbers are parted in more than halves.
    """
    parts = _PARTS if len(logits) <= _FEW and target().platform != "cpu" else 2
    one = jnp.zeros_like(logits[:, :1], jnp.int32)

    def number(bits: jax.Array) -> jax.Array:
        return -jax.lax.bitcast_convert_type(bits, jnp.float32)

    def parted(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        good, bad = bounds  # the first stays, and the second does not or is beyond -inf
        size = (bad - good + parts - 1) // parts
        between = jax.lax.optimization_barrier(good + size * jnp.arange(1, parts))
        fits = (between < bad) & stay(jnp.asarray(logits)[:, None] > number(between)[..., None])
        good = good + size * jnp.sum(fits, axis=1, keepdims=True, dtype=jnp.int32)
        return good, jnp.minimum(good + size, bad)

    bounds = one, jnp.where(wanted, one + (_INFINITE + 1), one)
    good, _ = jax.lax.while_loop(lambda bounds: jnp.any(bounds[1] - bounds[0] > 1), parted, bounds)
    return jnp.where(wanted, number(good), -jnp.inf)


def best_of(scores: Float[Array, "B V"], number: int) -> tuple[Int32[jax.Array, "B N"], Float[jax.Array, "B N"]]:
    """The best tokens of each row and their scores, of equal ones the first. On an accelerator nothing is sorted."""

    def sorted_out(scores: jax.Array) -> tuple[jax.Array, jax.Array]:  # many times faster on a processor
        values, ids = jax.lax.top_k(scores, number)
        return ids.astype(jnp.int32), values

    return jax.lax.platform_dependent(scores, cpu=sorted_out, default=lambda scores: one_by_one(scores, number))


def one_by_one(scores: Float[Array, "B V"], number: int) -> tuple[Int32[jax.Array, "B N"], Float[jax.Array, "B N"]]:
    """`best_of`, each token the best of those behind the last one."""
    B, V = scores.shape
    tokens = jnp.arange(V, dtype=jnp.int32)

    def one(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ids, values = found
        token, value = (jax.lax.dynamic_slice_in_dim(x, jnp.maximum(i - 1, 0), 1, axis=1) for x in found)
        comes = (scores < value) | ((scores == value) & (tokens > token)) | (i == 0)
        next_one = jnp.argmax(jnp.where(comes, scores, -jnp.inf), axis=-1).astype(jnp.int32)[:, None]
        its = jnp.take_along_axis(scores, next_one, axis=1)
        return jax.lax.dynamic_update_slice(ids, next_one, (0, i)), jax.lax.dynamic_update_slice(values, its, (0, i))

    none = jnp.zeros((B, number), jnp.int32)
    return jax.lax.fori_loop(0, number, one, (none, none.astype(scores.dtype)))
