"""What a cache of several sizes would cost a model, tried by passes over whole rows: which layers keep is data.

A key j is seen by query i of a layer where

    i - j < window[layer]      it is in the layer's window
    i < until[layer, head, j]  or the layer keeps it so long: sinks for ever, watched tokens until better ones come

`Row.create` runs the model densely, once a row, and remembers what it expects and where it looks. `Row.until` plays the
watched cache on these looks: every 32 tokens those older than the window contend for the kept zone, and what loses is
gone for good. `Row.run` runs any set of layers. All sets, rows and sizes are one compiled program, which begins at the
lowest layer that has changed: what enters every layer is held.

What a set costs is told by how far its predictions are from the dense model's (their KL divergence, in nats a token):
that is what the loss would rise by if the dense model were right about the probabilities. The loss of the text's own
tokens tells the same with twice the noise, since it has one of the tokens that might have come (docs/keeping.md).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Float, Int32
from sepjax.config import AttentionConfig, with_own_window
from sepjax.model.rope import layer_numbers, layer_ropes, of_layer, rope_tables, rotate
from sepjax.model.transformer import Params, Transformer, merge, scaled_logits, split
from sepjax.model.unrolled import working_copy

_EVERY = 32  # tokens between two choices of what is kept
_PARTS = 8  # of a row's queries, each with the keys before its end: half of all pairs are in the future
_MOST_LIKELY = 64  # tokens that the dense model expects; the others count as one
_LOGITS = 2**26  # of a chunk of tokens at a time
_EVER = 2**30  # as `until`
_LEAST = 1e-30  # of a weight, so that its logarithm is finite


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Entries of a layer that keeps, and of one that does not."""

    num_sinks: int
    kept: int  # entries of the kept zone
    window: int  # beside it
    others: int  # window of the layers that keep nothing, sinks aside


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model laid out for trials of rows of one length."""

    graph: Any
    params: Params
    length: int  # T, a multiple of `aligned`
    attention: AttentionConfig  # whose looks count: `watch_after` and `watch_half_life`

    @classmethod
    def create(cls, model: Transformer, length: int, attention: AttentionConfig) -> "Prepared":
        """For rows of up to `length` tokens."""
        graph, params = split(model)
        return cls(graph, working_copy(params, model.config), aligned(length), attention)


def aligned(length: int) -> int:
    """The next length that is cut into parts and choices."""
    unit = _PARTS * _EVERY
    return -(-length // unit) * unit


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of text in trials. Made by `create`."""

    model: Prepared
    tokens: Int32[np.ndarray, "T"]
    targets: Int32[np.ndarray, "T"]
    size: int  # scored tokens
    expected: tuple[jax.Array, jax.Array]  # ids [T, M] and log p of them, and of all others: [T, M + 1]
    looks: jax.Array  # [L, K, T / 32, T]: the sharpest of every 32 tokens at each token
    embedded: Float[jax.Array, "T D"]  # what enters the first layer

    @classmethod
    def create(cls, model: Prepared, ids: np.ndarray) -> "Row":
        """Runs the dense model over ids[N], N - 1 of which predict."""
        T = model.length
        tokens, targets = (np.pad(x, (0, T + 1 - len(ids))).astype(np.int32) for x in (ids[:-1], ids[1:]))
        expected, looks, x = _dense(model.graph, model.attention.watch_after, model.params, tokens)
        return cls(model, tokens, targets, len(ids) - 1, expected, looks, x)

    def until(self, geometry: Geometry) -> Int32[jax.Array, "L K T"]:
        """When each layer would drop each token if it kept watched ones in a cache of this geometry."""
        sizes = np.array((geometry.num_sinks, geometry.kept, geometry.window), np.int32)
        return _until(self.looks, sizes, self.model.attention.watch_half_life or _EVER)

    def run(
        self,
        keeps: np.ndarray,
        geometry: Geometry,
        until: Int32[jax.Array, "L K T"],
        first: int = 0,
        states: jax.Array | None = None,
    ) -> tuple[np.ndarray, jax.Array]:
        """Sums over the scored tokens, of the divergence from the dense model and of the loss, and the states.

        Args:
          keeps: bool[L], the layers that keep watched tokens.
          geometry: their sizes, and the others'.
          until: of that geometry.
          first: the layers below are as in the pass that `states` are from.
          states: of that pass, what enters each layer; None: all layers are run.
        """
        windows = np.where(keeps, geometry.window, geometry.others).astype(np.int32)
        sinks = np.where(np.arange(self.model.length) < geometry.num_sinks, _EVER, 0).astype(np.int32)
        if states is None:  # but for the first layer any would do
            states = jnp.broadcast_to(self.embedded, (len(keeps), *self.embedded.shape))
        found, entered = _trial(
            self.model.graph, self.model.params, states, self.tokens, self.targets, self.expected, until,
            (keeps, windows, sinks, np.int32(first)),
        )  # fmt: skip
        return np.asarray(found, np.float64)[:, : self.size].sum(axis=1), entered


def _rotating(model: Transformer, T: int) -> tuple[Any, tuple[Any, Any]]:
    """Rotations of all kinds of layers, and of each layer how far it sees by itself and its kind."""
    config = model.config
    ropes, kinds = layer_ropes(config)
    reach = with_own_window(AttentionConfig(), config).layer_reach
    tables = rope_tables(jnp.arange(T, dtype=jnp.int32)[None], ropes, config.head_dim)
    return tables, (layer_numbers([n or _EVER for n in reach]), layer_numbers(kinds))


def _weights(q: jax.Array, k: jax.Array, sees: jax.Array) -> jax.Array:
    """[K, G, I, J] of queries q[I, K, G, H] over keys k[J, K, H]; sees[(K), I, J]."""
    scores = jnp.einsum("ikgh,jkh->kgij", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    sees = sees[:, None] if sees.ndim == 3 else sees
    return jax.nn.softmax(jnp.where(sees, scores, -jnp.inf), axis=-1)


def _attend(tables: Any, sees: Any, look: Any = None) -> Any:
    """Attention a part of the queries at a time. `sees(layer, i, j)` masks; `look(weights, i, j)` collects."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        (reach, rope), *own = layer
        if tables is not None:
            table = of_layer(tables, rope)
            q, k = rotate(q, table), rotate(k, table)
        _, T, N, H = q.shape
        q, k, v = q[0].reshape(T, k.shape[2], -1, H), k[0], v[0]
        outs, looks = [], []
        for part in range(_PARTS):
            start, end = (T * x // _PARTS for x in (part, part + 1))
            i, j = jnp.arange(start, end)[:, None], jnp.arange(end)
            seen = (i >= j) & sees(own, i, j)
            seen = seen if reach is None else seen & (i - j < reach)
            weights = _weights(q[start:end], k[:end], seen)
            outs.append(jnp.einsum("kgij,jkh->ikgh", weights.astype(v.dtype), v[:end]))
            if look is not None:
                looks.append(look(weights, i, j))
        found = jnp.concatenate(looks, axis=1) if looks else None
        return jnp.concatenate(outs).reshape(1, T, N, H), found

    return attend


def _layers(
    model: Transformer, states: Array, first: Array, attend: Any, inputs: Any, outputs: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """Runs the layers from `first` on; what leaves the last, what enters each, and `outputs` with each one's set."""
    graph, params = split(model.layers)
    take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)

    def body(layer: jax.Array, carry: Any) -> Any:
        x, states, outputs = carry
        states = jax.lax.dynamic_update_index_in_dim(states, x, layer, 0)
        block, own = (jax.tree.map(lambda a: take(a, layer), tree) for tree in (params, inputs))
        x, found = merge(graph, block)(x[None], attend, own)
        if outputs is not None:
            outputs = jax.lax.dynamic_update_index_in_dim(outputs, found, layer, 0)
        return x[0], states, outputs

    return jax.lax.fori_loop(first, model.config.num_layers, body, (take(states, first), states, outputs))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense(graph: Any, after: int, params: Params, tokens: Array) -> tuple[Any, jax.Array, jax.Array]:
    """What the dense model expects, how sharply it looks at each token, and what enters its first layer."""
    model, T = merge(graph, params), len(tokens)
    config = model.config
    tables, kinds = _rotating(model, len(tokens))

    def sharpest(weights: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        looks = jnp.max(jnp.where(i - j >= after, weights, 0.0), axis=1)
        looks = looks.reshape(len(looks), -1, _EVERY, looks.shape[-1]).max(axis=2)
        return jnp.pad(looks, ((0, 0), (0, 0), (0, T - looks.shape[-1]))).astype(jnp.float16)

    embedded = model.embed(tokens[None], jnp.arange(T, dtype=jnp.int32)[None])[0]
    states = jnp.broadcast_to(embedded, (config.num_layers, *embedded.shape))
    looks = jnp.zeros((config.num_layers, config.num_kv_heads, T // _EVERY, T), jnp.float16)
    attend = _attend(tables, lambda own, i, j: True, sharpest)
    x, _, looks = _layers(model, states, jnp.int32(0), attend, (kinds,), looks)

    def expect(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        best, ids = jax.lax.top_k(_log_p(model, x), min(_MOST_LIKELY, config.vocab_size - 1))
        return ids, jnp.concatenate([best, _log_of_others(best)], axis=-1)

    return _in_chunks(expect, config.vocab_size, x), looks, embedded


@functools.partial(jax.jit, static_argnums=2)
def _until(looks: Array, sizes: Array, half_life: int) -> Int32[jax.Array, "L K T"]:
    return jax.vmap(lambda layer: _kept_until(layer, sizes, half_life))(looks)


def _kept_until(looks: Float[jax.Array, "K M T"], sizes: Array, half_life: int) -> Int32[jax.Array, "K T"]:
    """When each token is dropped by a watched cache that has had these looks, the sharpest of every `_EVERY` tokens."""
    sinks, kept, window = sizes
    K, _, T = looks.shape
    j = jnp.arange(T)

    def choose(carry: tuple[jax.Array, jax.Array], seen: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        score, until = carry
        now, look = seen
        score = jnp.maximum(score, jnp.log2(jnp.maximum(look.astype(jnp.float32), _LEAST)) + now / half_life)
        contends = (j >= sinks) & (j < now - window) & (until == _EVER)
        ranked = jnp.sort(jnp.where(contends, -score, jnp.inf), axis=-1)
        worst = -jnp.take_along_axis(ranked, jnp.full((K, 1), jnp.maximum(kept, 1) - 1), axis=-1)
        loses = contends & ((score < worst) | (kept < 1))
        return (score, jnp.where(loses, now, until)), None

    start = jnp.full((K, T), -jnp.inf), jnp.full((K, T), _EVER, jnp.int32)
    ends = jnp.arange(1, looks.shape[1] + 1) * _EVERY
    (_, until), _ = jax.lax.scan(choose, start, (ends, jnp.moveaxis(looks, 1, 0)))
    return until


@functools.partial(jax.jit, static_argnums=0)
def _trial(
    graph: Any, params: Params, states: Array, tokens: Array, targets: Array, expected: Any, until: Array, inputs: Any
) -> tuple[Float[jax.Array, "2 T"], jax.Array]:
    model = merge(graph, params)
    keeps, windows, sinks, first = inputs
    tables, kinds = _rotating(model, len(tokens))
    until = jnp.maximum(jnp.where(keeps[:, None, None], until, 0), sinks)

    def sees(own: Any, i: jax.Array, j: jax.Array) -> jax.Array:
        window, until = own
        return (i - j < window) | (i < until[:, None, : len(j)])

    x, states, _ = _layers(model, states, first, _attend(tables, sees), (kinds, windows, until))

    def compare(x: jax.Array, target: jax.Array, ids: jax.Array, expected: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p = _log_p(model, x)
        best = jnp.take_along_axis(log_p, ids, axis=-1)
        found = jnp.concatenate([best, _log_of_others(best)], axis=-1)
        loss = -jnp.take_along_axis(log_p, target[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.exp(expected) * (expected - found), axis=-1), loss

    return jnp.stack(_in_chunks(compare, model.config.vocab_size, x, targets, *expected)), states


def _log_p(model: Transformer, x: jax.Array) -> jax.Array:
    x = model.final_norm(x[None])[0]
    head = model.output_embedding().astype(x.dtype)
    logits = jnp.einsum("td,vd->tv", x, head, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(scaled_logits(logits, model.config))


def _log_of_others(best: jax.Array) -> jax.Array:
    """log of what the likely tokens leave to all others."""
    return jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(best), axis=-1, keepdims=True), 1e-6))


def _in_chunks(f: Any, vocabulary: int, *arrays: Any) -> Any:
    """f over chunks of the first axis, so that the logits of all tokens never exist at once."""
    T = len(arrays[0])
    chunks = next(n for n in range(min(T, max(1, T * vocabulary // _LOGITS)), T + 1) if T % n == 0)
    parts = jax.lax.map(lambda x: f(*x), tuple(jnp.asarray(x).reshape(chunks, -1, *x.shape[1:]) for x in arrays))
    return jax.tree.map(lambda x: x.reshape(T, *x.shape[2:]), parts)
