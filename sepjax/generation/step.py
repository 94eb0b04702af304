"""One step: prompts fill a cache, then the next tokens of every row run against it.

    prefill       prompts in one pass, with the layout and attention of training   -> logits of the next token, cache
    decode_step   one token of every row against a cache, growing or bounded       -> logits of the next token, cache
    take_up_run   a run of tokens of every row, to its next compaction             -> the same, and how many they were

A decode step's attention is the last row of the training mask (METHOD section 3), so both give the same scores.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens
from sepjax.config import AttentionConfig
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.growing_pass import is_global_token
from sepjax.generation.cache.protocol import Cache
from sepjax.model.attend import run_rows
from sepjax.model.packed import Packed
from sepjax.model.transformer import Params
from sepjax.model.unrolled import runner
from sepjax.separators import flag_separators


def prefill(
    graph: nnx.GraphDef,
    params: Params,
    tokens: Tokens,
    lengths: Int32[Array, "B"],
    table: Bool[Array, "_"],
    attention: AttentionConfig,
    *,
    window_size: int,
    capacity: int,
) -> tuple[Float[jax.Array, "B V"], SeparatorCache]:
    """Runs right-padded prompts, each row one document.

    Args:
      graph: from `sepjax.model.transformer.split`.
      params: the parameters that came with it, or those of `sepjax.model.unrolled.by_layer`.
      tokens: int32[B, T], any ids beyond a row's length.
      lengths: tokens of each prompt, 1 to T.
      table: bool over the vocabulary, from `sepjax.separators.configured_table`.
      attention: the pattern.
      window_size: W of the cache: the largest window of any layer, or a length that no row will pass.
      capacity: S of the cache, at least the sinks and separators before any row's last W tokens.

    Returns:
      float32 scores of the token after each prompt, and the cache.
    """
    model = runner(graph, params, scan=True)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    is_separator = flag_separators(tokens, positions, table, attention)
    segment_ids = None  # the padding comes last, where causality alone hides it
    if attention.pattern != "dense":
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    is_global = is_global_token(tokens, positions, table, attention)
    if model.config.position_embedding == "learned":  # of the padding there may be none: NaN, for all that it touches
        positions = jnp.minimum(positions, model.config.max_positions - 1)
    rows = run_rows(model, tokens, positions, is_separator, segment_ids, attention, keep_keys=True)
    scores = rows.scores
    sizes: dict = {"window_size": window_size, "capacity": capacity, "cache_dtype": attention.cache_dtype}
    if scores is not None:
        scores = jnp.where(is_global, -jnp.inf, scores)
        is_global |= rows.is_separator
        sizes |= {"stretch": attention.gate_stretch, "keep": attention.gate_keep}
    k, v = rows.keys
    cache = SeparatorCache.from_prompt(k, v, is_global, lengths, scores, **sizes)
    return model.logits(rows.hidden[jnp.arange(len(lengths)), lengths - 1]), cache


def decode_step(
    graph: nnx.GraphDef,
    params: Params,
    cache: Cache,
    tokens: Int32[Array, "B"],
    table: Bool[Array, "_"],
    attention: AttentionConfig,
    active: Bool[Array, "B"] | None = None,
) -> tuple[Float[jax.Array, "B V"], Cache]:
    """Runs the next token of every row and appends it to the cache.

    Args:
      graph: from `sepjax.model.transformer.split`.
      params: the parameters that came with it, or those of `sepjax.model.unrolled.by_layer`.
      cache: what came before. Donate it where this is jitted.
      tokens: one token a row.
      table: as for `prefill`.
      attention: as for `prefill`.
      active: rows that the cache shall take up, the others stay as they are and their scores mean nothing; None: all.

    Returns:
      float32 scores of the token after this one, and the cache with this one. What is stuck
      (`Cache.is_stuck`) loses a token.
    """
    logits, cache = take_up_one(graph, params, cache, tokens, table, attention, active)
    return logits, cache.compact()


def take_up_one(
    graph: nnx.GraphDef,
    params: Params,
    cache: Cache,
    tokens: Int32[Array, "B"],
    table: Bool[Array, "_"],
    attention: AttentionConfig,
    active: Bool[Array, "B"] | None = None,
) -> tuple[Float[jax.Array, "B V"], Cache]:
    """`decode_step` but for the compaction, which is due before the next one."""
    model = runner(graph, params)
    counts = jnp.ones_like(tokens) if active is None else jnp.asarray(active).astype(jnp.int32)
    hidden, cache = cache.take_up(model, tokens[:, None], counts, table, attention)
    return model.logits(hidden[:, 0]), cache


def take_up_run(
    graph: nnx.GraphDef,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    left: Int32[Array, "B"],
    table: Bool[Array, "_"],
    attention: AttentionConfig,
    *,
    scan: bool = True,
    most: int | None = None,
) -> tuple[Float[jax.Array, "B V"], Cache, Int32[jax.Array, "B"]]:
    """Takes up some of the next tokens of every row: to its next compaction, at most T. No row is due before.

    Args:
      graph: from `sepjax.model.transformer.split`.
      params: the parameters that came with it, or those of `sepjax.model.unrolled.by_layer`.
      cache: what came before. Donate it where this is jitted.
      tokens: int32[B, T], the next ones.
      left: how many of them there are, 0 to T.
      table: as for `prefill`.
      attention: as for `prefill`.
      scan: see `Layerwise`; not over layers of a cache that lies among others, all of which it would copy.
      most: tokens of all rows together, if `left` are no more: as many are computed, and no padding (but of a gate's
        model).

    Returns:
      float32 scores of the token after the last that a row took up (of none they mean nothing), the cache, in which
      some rows may be due, and how many each took up.
    """
    model = runner(graph, params, scan=scan)
    counts = jnp.minimum(cache.room(tokens.shape[1]), left)
    if most is not None and most < tokens.size and attention.pattern != "gated":
        model = Packed(model, counts, tokens.shape[1], most)
    hidden, cache = cache.take_up(model, tokens, counts, table, attention)
    return model.logits(hidden[jnp.arange(len(counts)), jnp.maximum(counts - 1, 0)]), cache, counts
