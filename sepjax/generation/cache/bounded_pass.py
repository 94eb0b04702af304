"""The forward pass over a run of tokens and a bounded cache: one token or hundreds, with the same result.

Between two compactions a cache only grows, so a run of tokens up to a row's next compaction needs one pass. Every token
sees the entries that were there when it came and those of the run before it:

    keys       sinks, separators | ring | the run itself
    visible    all that is there | p >= first_recent            and the run's are not younger than the query

Queries and keys of different zones must be turned to fit each other (`StreamingCache`): one token turns its query three
times, which costs nothing; many tokens turn the few old keys once.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Float, Int32, SeparatorTable, Tokens
from sepjax.config import AttentionConfig
from sepjax.generation.cache.bounded_run import attend_many
from sepjax.generation.cache.bounded_step import attend_one
from sepjax.generation.cache.one_row_pass import one_row_pass, shape_of_one_row
from sepjax.generation.cache.rows import InPlace
from sepjax.model.gate import run_with_gate
from sepjax.model.layers import Attend
from sepjax.model.rope import layer_numbers
from sepjax.separators import flag_separators

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache


def stream_pass(
    model: Any,
    cache: "StreamingCache",
    tokens: Tokens,
    counts: Int32[Array, "B"],
    table: SeparatorTable,
    attention: AttentionConfig,
) -> tuple[Float[jax.Array, "B T D"], "StreamingCache"]:
    """Runs the next tokens of every row and takes them up.

    Args:
      model: a `Transformer` or `Layerwise`; or, without a gate, what maps (tokens, positions, attend, layer_inputs) to
        hidden states as they do.
      cache: what came before; no row is due for a compaction. Donate it where this is jitted.
      tokens: int32[B, T], any ids at and beyond a row's count.
      counts: tokens that each row takes up, 0 to `cache.room(T)`. Hidden states beyond mean nothing.
      table: as `sepjax.separators.flag_separators` has it.
      attention: the pattern that `cache.sizes` were made for.

    Returns:
      Hidden states after the final norm, and the cache, whose rows may be due now: `compact` it before the next pass.
    """
    T = tokens.shape[1]
    offsets = cache.seen_low[:, None] + jnp.arange(T, dtype=jnp.int32)
    is_separator = flag_separators(tokens, offsets, table, attention)
    shape = shape_of_one_row(model, cache, attention) if tokens.size == 1 else None
    if shape is not None:
        return one_row_pass(shape, model, cache, tokens, counts, is_separator)
    in_place = InPlace()
    attend = attend_run(cache, T, counts, attention.implementation, in_place)
    inputs = pass_inputs(cache)
    if attention.pattern == "gated":
        hidden, (k, v), scores = run_with_gate(model, tokens, offsets, attend, inputs, attention)
        return hidden, cache.append(k, v, is_separator, counts, gate_scores=scores, in_place=in_place)
    hidden, (k, v, *looks) = model(tokens, offsets, attend, inputs)
    return hidden, cache.append(k, v, is_separator, counts, *looks, in_place=in_place)


def attend_run(
    cache: "StreamingCache",
    num_tokens: int,
    counts: Int32[Array, "B"],
    implementation: str | None = None,
    in_place: InPlace | None = None,
) -> Attend:
    """The attention of a run of so many tokens, of which each row takes up `counts`; with `pass_inputs`.

    `implementation`: what the config names for training; see `sepjax.attention.decode.unsupported`. `in_place`: where
    to leave what kernels write themselves, for `StreamingCache.append`; None: they write nothing.
    """
    if num_tokens > 1:
        return attend_many(cache, num_tokens, counts, implementation)
    assert not cache.is_in_place, "steps have all rows"
    return attend_one(cache, counts > 0, implementation, in_place)


def pass_inputs(cache: "StreamingCache") -> tuple[Any, ...]:
    """What `attend_run` is given in each layer: items with an entry a layer, or None."""
    sizes = cache.sizes
    layers: Any = cache.k
    watched = None if sizes.watch is None else np.array(sizes.watch.layers)  # known where layers are not scanned
    return (
        cache.k, cache.v, layer_numbers(sizes.reach), layer_numbers(sizes.sees_kept), layer_numbers(sizes.layer_ropes),
        watched, np.arange(len(layers) if isinstance(layers, tuple) else layers.shape[0]),
    )  # fmt: skip
