"""What every token id is worth to a model when it is far away: how often it comes, and what it gives then.

Every row of text is run once, dense. Three measures, each summed over the places where an id stands, and then a use:

    rarity      -count: names and terms come seldom, and are what the text alone can tell
    attention   the squared attention weights that the place receives from queries n or more tokens later, summed over
                heads, layers and queries. Squared: a sharp look is worth more than many faint ones
    loss        what the later tokens' loss gains from the place's values when they are far. Values that are n or more
                tokens away are scaled by g, the same for all layers and heads, and the loss is differentiated by the g
                of each place at g = 1/2. That is the midpoint between nothing far (g = 0) and everything (g = 1), so
                that the gains of all places add up to the difference of the two losses, up to third order; one backward
                pass gives all of them, where leaving places out one by one would take a pass each

The mean of an id that came seldom is uncertain, and an id that never came has none: both are drawn to the mean of ids
that came about as often (`per_use`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Float, Int32
from sepjax.config import AttentionConfig, ConfigError, with_own_window
from sepjax.evaluation.token_loss import token_nll
from sepjax.model.rope import layer_numbers, layer_ropes, of_layer, rope_tables, rotate
from sepjax.model.transformer import Transformer, merge, split
from sepjax.model.unrolled import working_copy
from sepjax.progress import counted

_PRIOR = 4.0  # uses that the mean of equally rare ids counts for


def worth(
    model: Transformer, rows: Sequence[Int32[np.ndarray, "_"]], by: str, *, window_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measures ids on rows of text.

    Args:
      model: from `sepjax.load`.
      rows: token ids of up to T + 1 tokens each; the last is a target only.
      by: "attention" or "loss".
      window_size: n; nearer than that every token is seen anyway.

    Returns:
      float64[V] sums, and int64[V] how often each id came.

    Raises:
      ConfigError: rows that are longer than a table of learned positions.
    """
    V = model.config.vocab_size
    sums, counts = np.zeros(V), np.zeros(V, np.int64)
    for ids, found in _measured(model, rows, functools.partial(_MEASURES[by], window_size), f"measuring by {by}"):
        np.add.at(sums, ids[:-1], found[0, : len(ids) - 1])
        np.add.at(counts, ids[:-1], 1)
    return sums, counts


def far_looks(
    model: Transformer, rows: Sequence[Int32[np.ndarray, "_"]], *, window_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row with the far attention (above) that each of its places but the last receives, float64."""
    for ids, found in _measured(model, rows, functools.partial(_received, window_size), "measuring by attention"):
        yield ids, found[0, : len(ids) - 1]


def per_use(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float64[V]: the mean a use, drawn to that of ids of the same octave of counts as if they had added four uses."""
    octave = np.floor(np.log2(np.maximum(counts, 1))).astype(int)
    total, uses = (np.bincount(octave, weights=x) for x in (sums, counts))
    prior = (total / np.maximum(uses, 1))[octave]
    return (sums + _PRIOR * prior) / (counts + _PRIOR)


def best_ids(value: np.ndarray, counts: np.ndarray, density: float, candidates: np.ndarray) -> np.ndarray:
    """Ids of the largest value, of the `candidates` bool[V], that together are at most `density` of all tokens.

    One that is too frequent for the room that is left is passed over. Nothing more is taken when 2 % of the room is
    left: ids that never came would all fit.
    """
    room = budget = density * counts.sum()
    taken = []
    for i in np.flatnonzero(candidates)[np.argsort(-value[candidates], kind="stable")].tolist():
        if counts[i] <= room:
            taken.append(i)
            room -= counts[i]
        if room < 0.02 * budget:
            break
    return np.array(sorted(taken), int)


def _measured(
    model: Transformer, rows: Sequence[np.ndarray], measure: Callable[..., jax.Array], what: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row of ids with what `measure` finds in it, float64, with progress: all rows run as one program does."""
    graph, params = split(model)
    step = jax.jit(functools.partial(measure, graph))
    params, length = working_copy(params, model.config), max(map(len, rows)) - 1
    if model.config.position_embedding == "learned" and length > model.config.max_positions:
        most = model.config.max_positions
        raise ConfigError(f"rows of {length} tokens pass the model's {most} learned positions; give --length={most}")
    for ids in counted(rows, what, sum(map(len, rows)), "tokens", len):
        padded = np.pad(ids, (0, length + 1 - len(ids)))[None]
        found = step(params, padded[:, :-1], padded[:, 1:], np.int32(len(ids) - 1))
        yield ids, np.asarray(found, np.float64)


def _attend(window_size: int, T: int, tables: Any, visit: Callable[..., Any]) -> Any:
    """Dense attention, written out: `visit` gets weights [B, K, G, T, T], where they are far, and values."""
    i = jnp.arange(T)
    causal, far = i[:, None] >= i, i[:, None] - i >= window_size

    @functools.partial(jax.checkpoint, prevent_cse=False)  # weights are made again where they are needed
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        reach, rope = layer
        if tables is not None:
            table = of_layer(tables, rope)
            q, k = rotate(q, table), rotate(k, table)
        B, _, N, H = q.shape
        q = q.reshape(B, T, k.shape[2], N // k.shape[2], H)
        scores = jnp.einsum("bikgh,bjkh->bkgij", q, k, preferred_element_type=jnp.float32) * H**-0.5
        sees = causal if reach is None else causal & (i[:, None] - i < reach)
        weights = jax.nn.softmax(jnp.where(sees, scores, -jnp.inf), axis=-1)
        out, found = visit(weights, far, v)
        return out.reshape(B, T, N, H).astype(v.dtype), found

    return attend


def _run(graph: Any, window_size: int, params: Any, tokens: jax.Array, visit: Any) -> tuple[Transformer, Any, Any]:
    model = merge(graph, params)
    T, config = tokens.shape[1], model.config
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens.shape)
    ropes, kinds = layer_ropes(config)
    reach = with_own_window(AttentionConfig(), config).layer_reach  # dense, so far as the model is
    inputs = layer_numbers([n or T for n in reach]), layer_numbers(kinds)
    tables = rope_tables(positions, ropes, config.head_dim)
    hidden, found = model(tokens, positions, _attend(window_size, T, tables, visit), inputs)
    return model, hidden, found


def _received(
    window_size: int, graph: Any, params: Any, tokens: jax.Array, targets: jax.Array, length: jax.Array
) -> Float[jax.Array, "B T"]:
    is_query = jnp.arange(tokens.shape[1]) < length

    def visit(weights: jax.Array, far: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = jnp.where(far & is_query[:, None], weights, 0.0)
        return jnp.einsum("bkgij,bjkh->bikgh", weights, v), jnp.sum(seen**2, axis=(1, 2, 3))

    return jnp.sum(_run(graph, window_size, params, tokens, visit)[2], axis=0)


def _saved(
    window_size: int, graph: Any, params: Any, tokens: jax.Array, targets: jax.Array, length: jax.Array
) -> Float[jax.Array, "B T"]:
    is_query = jnp.arange(tokens.shape[1]) < length

    def loss(scale: jax.Array) -> jax.Array:
        def visit(weights: jax.Array, far: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            scaled = jnp.where(far, weights * scale[:, None, None, None, :], weights)
            return jnp.einsum("bkgij,bjkh->bikgh", scaled, v), None

        model, hidden, _ = _run(graph, window_size, params, tokens, visit)
        losses = token_nll(hidden, model.output_embedding(), targets, model.config)
        return jnp.sum(jnp.where(is_query, losses, 0.0))

    return -jax.grad(loss)(jnp.full(tokens.shape, 0.5))


_MEASURES = {"attention": _received, "loss": _saved}
