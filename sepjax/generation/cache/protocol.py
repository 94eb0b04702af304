"""What generation asks of a cache, whichever it is.

    room      how many tokens the next pass may take up       growing: any; bounded: up to the row's next compaction
    take_up   the pass itself, one token or many              hidden states, and the cache with them
    compact   what must happen before the next pass           growing: nothing
    is_stuck  rows that cannot take up one more               growing: until it is larger; bounded: never, or for good

A cache is a frozen pytree: every method returns another one, and whoever compiles it donates the old.
"""

from typing import Any, Protocol, runtime_checkable

import jax

from sepjax.array_typing import Array, Bool, Int32, Tokens
from sepjax.config import AttentionConfig


@runtime_checkable
class Cache(Protocol):
    """Keys and values of B rows. `SeparatorCache` grows, `StreamingCache` and `MixedCache` are bounded."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        ...

    def held(self) -> Int32[jax.Array, "B"]:
        """Tokens that each row holds; where layers differ, averaged over them."""
        ...

    def room(self, most: int) -> Int32[jax.Array, "B"]:
        """How many tokens, up to `most`, the next pass may take up."""
        ...

    def take_up(
        self, model: Any, tokens: Tokens, counts: Int32[Array, "B"], table: Bool[Array, "_"], attention: AttentionConfig
    ) -> tuple[Any, "Cache"]:
        """Runs the next tokens of every row and takes them up.

        Args:
          model: a `Transformer` or `Layerwise`.
          tokens: int32[B, T], any ids at and beyond a row's count.
          counts: tokens that each row takes up, 0 to `room(T)`. Hidden states beyond mean nothing.
          table: bool over the vocabulary, from `sepjax.separators.configured_table`.
          attention: the pattern that the cache was made for.

        Returns:
          Hidden states [B, T, D] after the final norm, and the cache: `compact` it before the next pass.
        """
        ...

    def compact(self) -> "Cache":
        """Drops what must go before the next pass."""
        ...

    @property
    def ends_when_stuck(self) -> bool:
        """Whether a row that is stuck is so for good: `make_room` would raise."""
        ...

    def is_stuck(self) -> Bool[jax.Array, "B"]:
        """Rows whose next token has no place without a loss: `make_room` first."""
        ...

    def make_room(self) -> "Cache":
        """A larger copy. Raises ConfigError where the cache is bounded by its settings."""
        ...
