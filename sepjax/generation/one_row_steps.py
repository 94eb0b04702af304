"""Steps of a single row, where one kernel runs all layers: as little else as there can be.

A kernel that computes next to nothing costs as much as it takes to start, and a branch or a loop of a CUDA graph more.
So what changes from step to step, but for keys and values and the words used, is one array of whole numbers, which one
kernel writes. And whatever else a step may have to do is left to the steps around these, of any rows: they end before
a compaction, and serve nobody who asks for probabilities. There are two kinds, each a loop of its own:

    greedy    what is told  ->  all layers  ->  scores  ->  the best (two kernels)  ->  the next numbers
    hot       the same with a draw in the place of the best, and the words used
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.generation.cache.one_row_numbers import Numbers
from sepjax.generation.lost import LOST, is_lost
from sepjax.generation.penalties import after_drawing, after_drawing_all, biased, penalised, without
from sepjax.generation.sampling import drawn_hot

MOST_ENDS = 16  # end tokens that are compared one by one
_ROW = ("token", "count", "done")  # of the state, besides those of its cache

type _Now = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]  # numbers as one array, uses, keys and values


@dataclasses.dataclass(frozen=True)
class RowSteps:
    """Of one row, which has begun."""

    row: Any  # a `Bounded` or `Growing` of `sepjax.generation.cache.one_row_numbers`
    request: Any  # a `sepjax.generation.device_loop.Request`
    most: int  # steps
    most_count: int  # tokens drawn, at which another key comes

    def run(
        self, i: jax.Array, state: Any, tokens: Int32[Array, "1 M"], held: Int32[Array, "1 M"]
    ) -> tuple[jax.Array, Any, Int32[jax.Array, "1 M"], Int32[jax.Array, "1 M"]]:
        """Steps from number `i` on, of a `sepjax.generation.device_loop.DecodeState` that goes on, while they `serve`.

        tokens, held: the record of tokens drawn and held. Returns the same after these steps.
        """
        numbers = self._numbers(i, state, jnp.asarray(tokens), jnp.asarray(held))
        changes = functools.partial(self._changes, state)
        if self.most > 1:  # the same for all steps, so made before them
            made = changes()
            changes = lambda: made  # noqa: E731

        def loop(carry: _Now, *, hot: bool) -> _Now:
            cond = lambda carry: self._serves(_unpacked(carry[0], numbers), state.cache, hot=hot)  # noqa: E731
            step = functools.partial(self._step, numbers, state, changes if hot else lambda: None)
            return jax.lax.while_loop(cond, step, carry)

        line, _, entries = loop((_packed(numbers), state.uses, self.row.entries(state.cache)), hot=False)
        now = _unpacked(line, numbers)
        place = jnp.arange(tokens.shape[1])
        drawn = jnp.where(now["tokens"] == LOST, now["token"], now["tokens"])  # the last one, if any
        uses = after_drawing_all(state.uses, jnp.where((place >= i) & (place < now["i"]), drawn, -1))
        line, uses, entries = loop((line, uses, entries), hot=True)
        # Of a sum XLA makes one kernel with all its parts; of an array as it is, a copy of each. The number is 0.
        now = _unpacked(line + (line[:1] < 0), numbers)
        cache = self.row.with_entries(self.row.cache(state.cache, now), entries)
        state = dataclasses.replace(state, cache=cache, uses=uses, **{name: now[name] for name in _ROW})
        return now["i"][0], state, now["tokens"], now["held"]

    def serves(self, i: jax.Array, state: Any) -> Bool[jax.Array, ""]:
        """Whether the next step is one of these: of a row that goes on, and after which nothing else is due."""
        numbers = self._numbers(i, state, i[None], i[None])
        greedy, hot = (self._serves(numbers, state.cache, hot=hot) for hot in (False, True))
        return greedy | hot

    def _numbers(self, i: jax.Array, state: Any, tokens: jax.Array, held: jax.Array) -> Numbers:
        own = {name: getattr(state, name) for name in _ROW}
        return {"i": i.reshape(1), **own, **self.row.numbers(state.cache), "tokens": tokens, "held": held}

    def _serves(self, numbers: Numbers, cache: Any, *, hot: bool) -> jax.Array:
        request, count = self.request, numbers["count"]
        goes_on = (numbers["i"] < self.most) & ~numbers["done"] & self.row.is_all(self.row.cache(cache, numbers))
        asks = jnp.asarray(request.logprobs) | jnp.asarray(request.top_logprobs)
        is_early = count < request.min_new_tokens
        kind = request.sampling.is_hot() if hot else request.sampling.is_plain() & ~is_early
        return (goes_on & kind & ~asks & (count + 1 < self.most_count))[0]

    def _changes(self, state: Any) -> tuple[jax.Array, jax.Array]:
        """What every step adds to scores, [1, V], and which tokens are not drawn at first: the same for all steps."""
        none = jnp.zeros(state.uses.shape, jnp.float32)
        return biased(none, self.request.sampling), without(none, self.request.end_tokens, jnp.ones(1, bool)) < 0

    def _step(self, like: Numbers, state: Any, changes: Any, carry: _Now) -> _Now:
        line, uses, entries = carry
        numbers, request = _unpacked(line, like), self.request
        token, i, cache = numbers["token"], numbers["i"], self.row.cache(state.cache, numbers)
        hidden, entries = self.row.step(cache, token, entries)
        logits = self.row.model.logits(hidden[:, 0])[:, : len(request.table)]
        if (changed := changes()) is None:
            drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            drawn = self._drawn(logits, numbers["count"], state.key, uses, changed)
            uses = after_drawing(uses, drawn, jnp.ones(1, bool))
        after, count = self.row.after(cache, token, request.table, numbers["in_cache"]), numbers["count"] + 1
        lost = is_lost(logits, drawn)
        ends = lost | ((count >= request.max_new_tokens) & (request.max_new_tokens >= 0))
        for column in range(request.end_tokens.shape[-1]):
            ends |= drawn == request.end_tokens[..., column]
        record = {"tokens": jnp.where(lost, LOST, drawn), "held": after["in_cache"]}
        numbers = {
            "i": i + 1, "token": drawn, "count": count, "done": ends, **after,
            **{name: _put(numbers[name], i, x) for name, x in record.items()},
        }  # fmt: skip
        return _packed(numbers), uses, entries

    def _drawn(
        self, logits: Float[jax.Array, "1 V"], count: jax.Array, key: jax.Array, uses: jax.Array, changes: Any
    ) -> Int32[jax.Array, "1"]:
        sampling, (bias, ends) = self.request.sampling.for_rows(1), changes
        is_early = count < self.request.min_new_tokens
        scores = jnp.where(ends & is_early[:, None], -jnp.inf, logits + bias)
        keys = jax.vmap(jax.random.fold_in)(key, count)
        return drawn_hot(penalised(scores, uses, sampling), keys, sampling)


def _packed(numbers: Numbers) -> jax.Array:
    return jnp.concatenate([x.reshape(-1).astype(jnp.int32) for x in numbers.values()])


def _unpacked(line: jax.Array, like: Numbers) -> Numbers:
    found, at = {}, 0
    for name, x in like.items():
        found[name] = jax.lax.slice_in_dim(line, at, at + x.size).reshape(x.shape).astype(x.dtype)
        at += x.size
    return found


def _put(line: jax.Array, i: jax.Array, x: jax.Array) -> jax.Array:
    """`line.at[:, i].set(x)` number by number, so that it is part of the kernel that writes all of them."""
    return jnp.where(jnp.arange(line.shape[1]) == i, x[:, None], line)
