"""A stream over a bounded cache: text goes in, text comes out, for as long as one likes, in constant memory.

    feed    new input, in passes up to the next compaction (`consume`)         pending -> cache, scores
    next    the next token is drawn from the scores, then decoded (`advance`)   an event a token

What the device holds between two tokens is one `DecodeState`; with a few words of the host's it can be saved at any
token and goes on from there as if nothing had happened.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.generation.cache.growing import bucket
from sepjax.config import AttentionConfig, ConfigError, validate_attention, with_own_window
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation import saved
from sepjax.generation.batch import CacheUse, StreamEvent
from sepjax.generation.limits import check_cache
from sepjax.generation.device_loop import DecodeState, Request, Steps, begin, make_advance, make_consume
from sepjax.generation.prompts import Ends, Prompt, check_stop, check_vocabulary, encode_prompts, row_keys
from sepjax.generation.saved import StreamStateError
from sepjax.generation.row import RepetitionGuard, TextUntilStop
from sepjax.model.transformer import Transformer, split
from sepjax.model.unrolled import by_layer
from sepjax.sampling import Sampling
from sepjax.separators import configured_table, warn_of_few_in
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.sizes import StreamSizes


class EndlessStream(Iterator[StreamEvent]):
    """Events of one text, or of the turns of a conversation.

    Attributes:
      finish_reason: why the turn has ended; None while it goes on. A new turn begins with `feed`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_at_eos: bool = True,
        stop_token_ids: Sequence[int] = (),
        control_tokens: bool = True,
        max_repeats: int = 0,
        attention: AttentionConfig | None = None,
    ):
        """See `sepjax.stream`. Nothing is generated before something was fed."""
        self._attention = with_own_window(attention or model.attention, model.config)
        validate_attention(self._attention, model.config.num_layers)
        check_vocabulary(model, tokenizer)
        self._sizes = StreamSizes.create(model.config, self._attention)
        check_cache(model.config, 1, self._sizes.slots, f"cache_size={self._sizes.cache_size}")
        self._config, self._tokenizer, self._stop = model.config, tokenizer, check_stop(stop)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens} must be 1 or more")
        if max_repeats < 0:
            raise ConfigError(f"max_repeats={max_repeats} must be 0 (as often as it likes) or more")
        self._max_new_tokens, self._max_repeats = max_new_tokens, max_repeats
        self._graph, self._params = split(model)
        self._step_params = by_layer(self._params, model.config)
        self._ends, self._control_tokens = Ends.create(tokenizer, stop_at_eos, stop_token_ids), control_tokens
        table = jnp.asarray(configured_table(tokenizer, self._attention))
        self._request = Request(table, sampling or Sampling.create(), jnp.asarray(self._ends.array()), jnp.int32(-1))
        self._advance = make_advance(self._graph, self._attention, 1)
        self._state = _empty(model, self._sizes, row_keys(seed, 1))
        self._pending: list[int] = []
        self._has_drawn = self._is_full = False
        self._seen = 0
        self._begin_turn(continues=False)

    def _begin_turn(self, *, continues: bool) -> None:
        self._text = TextUntilStop(self._tokenizer, self._stop, continues=continues)
        self._guard = RepetitionGuard(self._max_repeats)
        self._left = -1 if self._max_new_tokens is None else self._max_new_tokens
        self.finish_reason: str | None = None

    def feed(self, prompt: Prompt) -> None:
        """Appends input: a text (after BOS, if it is the first and the tokenizer puts one) or token ids; a new turn.

        Raises:
          PromptError: no tokens, or ids outside the vocabulary.
        """
        if isinstance(prompt, str) and (self._seen or self._pending):
            prompt = self._tokenizer.encode(prompt, control_tokens=self._control_tokens)
        (ids,) = encode_prompts(self._tokenizer, [prompt], control_tokens=self._control_tokens)
        warn_of_few_in(ids, self._request.table, self._attention, "the text fed")
        if self._has_drawn and not self._pending:  # the last token drawn has not been taken up yet
            self._pending.append(int(self._state.token[0]))
        self._pending += ids
        self._begin_turn(continues=any(self._tokenizer.token_bytes(i) for i in ids))

    @property
    def cache(self) -> CacheUse:
        """What the cache holds now."""
        return CacheUse(int(self._state.cache.held()[0]), self._seen, self._state.cache.nbytes)

    @property
    def cache_size(self) -> int:
        """c: the most entries that the cache may hold."""
        return self._sizes.cache_size

    @property
    def last_token(self) -> int | None:
        """The token drawn last; None before the first."""
        return int(self._state.token[0]) if self._has_drawn else None

    def __next__(self) -> StreamEvent:
        """Draws the next token. An interruption leaves the stream as it was before the token."""
        if self.finish_reason is not None or not (self._has_drawn or self._pending):
            raise StopIteration
        if self._is_full:
            raise ConfigError(
                f"the cache has no room for another separator: with keep_all_separators, cache_size="
                f"{self._sizes.cache_size} holds {self._sizes.max_separators}; raise it or let the oldest go"
            )
        if self._pending:
            steps = self._take_up()
        else:
            self._check_positions(1)
            none = np.zeros(1, bool)
            self._state, steps = self._advance(self._step_params, self._state, none, self._request)
            self._seen += 1
        self._has_drawn = True
        return self._event(jax.device_get(steps))

    def _take_up(self) -> Steps:
        """Feeds the pending tokens and draws the next one."""
        self._check_positions(len(self._pending))
        tokens = np.array([self._pending], np.int32)
        consume = make_consume(self._graph, self._attention)
        cache: Any = self._state.cache
        cache = cache.stacked()
        logits = jnp.zeros((1, self._config.vocab_size), jnp.float32)
        at = 0
        while at < tokens.shape[1]:
            part = tokens[:, at : at + self._sizes.chunk]
            padded = np.zeros((1, min(self._sizes.chunk, bucket(part.shape[1]))), np.int32)
            padded[:, : part.shape[1]] = part
            left = np.array([part.shape[1]], np.int32)
            cache, logits, taken = consume(self._params, cache, logits, padded, left, self._request.table)
            at += int(taken[0])
        self._state, steps = begin(cache, logits, self._state.count, self._state.key, self._request)
        self._seen += tokens.shape[1]
        self._pending = []
        return steps

    def _check_positions(self, more: int) -> None:
        """Slot numbers have no end; positions in the text are int32."""
        if self._sizes.absolute and self._seen + more >= 2**31:
            raise ConfigError(
                'attention.stream_positions="absolute" counts tokens of the text up to 2^31, which this stream reaches '
                'now; use "slot" for streams without end'
            )

    def _event(self, steps: Steps) -> StreamEvent:
        token = int(steps.token[0, 0])
        self._is_full = bool(steps.is_full)
        self._left -= 1
        ends = self._ends.reason(token)
        text = "" if ends == "stop" else self._text.feed(token)  # a stop token is no part of the text
        if self._text.stopped:
            self.finish_reason = "stop"
        elif ends:
            self.finish_reason = ends
        elif not self._left:
            self.finish_reason = "length"
        elif self._guard.feed(token):
            self.finish_reason = "repetition"
        if self.finish_reason is not None and not self._text.stopped:
            text += self._text.flush()
        use = CacheUse(int(steps.held[0, 0]), self._seen, self._state.cache.nbytes)
        return StreamEvent(text, (token,), self.finish_reason, use)

    # -- on disk ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes all that `restore` needs, in place of an older stream. A kill at any moment leaves the old or the new.

        Raises:
          sepjax.files.ForeignFolder: the folder holds something else than a saved stream.
          sepjax.files.WriteError: it cannot be written.
        """
        words = {
            "model": dataclasses.asdict(self._config),
            "sizes": dataclasses.asdict(self._sizes),
            "pending": self._pending,
            "has_drawn": self._has_drawn,
            "is_full": self._is_full,
            "seen": self._seen,
            "left": self._left,
            "finish_reason": self.finish_reason,
            "text": self._text.state(),
            "guard": self._guard.state(),
        }
        saved.write(folder, words, jax.tree.leaves(_plain(self._state)))

    def restore(self, folder: str | os.PathLike[str]) -> None:
        """Goes on where `save` was called, token for token.

        Raises:
          FileNotFoundError: nothing was saved there.
          StreamStateError: the files are damaged, or of a model of another shape, or of a cache of other sizes.
        """
        words, place = saved.read(folder)
        for name, ours in (("model", self._config), ("sizes", self._sizes)):
            mine = json.loads(json.dumps(dataclasses.asdict(ours)))
            different = sorted(key for key in mine.keys() | words[name].keys() if mine.get(key) != words[name].get(key))
            if different:
                key = different[0]
                raise StreamStateError(
                    f"the stream in {os.fspath(folder)!r} was saved with {name}.{key}={words[name].get(key)!r}, "
                    f"expected {mine.get(key)!r}; load the same model and give the same cache settings"
                )
        leaves, structure = jax.tree.flatten(_plain(self._state))
        state = jax.tree.unflatten(structure, saved.read_leaves(place, words, leaves))
        self._state = dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
        self._pending, self._has_drawn = words["pending"], words["has_drawn"]
        self._is_full, self._seen, self._left = words["is_full"], words["seen"], words["left"]
        self.finish_reason = words["finish_reason"]
        self._text.restore(words["text"])
        self._guard.restore(words["guard"])


def _empty(model: Transformer, sizes: StreamSizes, keys: jax.Array) -> DecodeState:
    cache = StreamingCache.create(model.config, 1, sizes, by_layer=True)
    token, count = (jnp.zeros(1, jnp.int32) for _ in range(2))
    return DecodeState(cache, token, count, jnp.zeros(1, bool), keys)


def _plain(state: DecodeState) -> DecodeState:
    """The state with its keys as plain numbers, which files can hold."""
    return dataclasses.replace(state, key=jax.random.key_data(state.key))
