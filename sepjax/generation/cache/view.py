"""What one row of a bounded cache holds, for people to look at: counts, and where in the text its entries stand."""

import dataclasses
from typing import Any

import jax
import numpy as np

from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.mixed import BoundedCache


@dataclasses.dataclass(frozen=True)
class CacheView:
    """Made by `of_row`."""

    seen: int  # tokens that have passed through
    sinks: int  # entries of each zone
    kept: int
    recent: int
    nbytes: int  # of the row's arrays, whatever they hold
    kept_positions: np.ndarray  # int64[G, N, kept], in no order: of each set of kept tokens (see `positions`)

    @property
    def held(self) -> int:
        """Entries."""
        return self.sinks + self.kept + self.recent

    @property
    def num_sets(self) -> tuple[int, int]:
        """(layers, key heads) that keep tokens of their own; (1, 1): all keep the same."""
        return self.kept_positions.shape[0], self.kept_positions.shape[1]

    def positions(self, layer: int = 0) -> np.ndarray:
        """Where in the text the entries of a layer stand, int64, in order; of several key heads, those of any.

        A kept token from more than 2^30 tokens ago is placed by that much too late.
        """
        kept = self.kept_positions[layer if len(self.kept_positions) > 1 else 0]
        recent = np.arange(self.seen - self.recent, self.seen)
        return np.unique(np.concatenate([np.arange(self.sinks), kept.ravel(), recent]))


def bookkeeping(cache: BoundedCache) -> StreamingCache:
    """The little that `of_row` needs of a cache: no keys, values or scores. Of several sizes, the first part's."""
    return dataclasses.replace(cache.main.bare(), scores=None)


def of_row(cache: BoundedCache, seen: int, nbytes: int, row: int = 0) -> CacheView:
    """The view of a row of a cache, `bookkeeping` or more.

    Args:
      cache: of one row or several.
      seen: tokens that the row has taken up.
      nbytes: of the row.
      row: which one.
    """
    few: Any = jax.device_get(bookkeeping(cache))
    numbers = few.num_sinks, few.num_separators, few.num_recent, few.next_separator
    sinks, kept, recent, end = (int(x[row]) for x in numbers)
    s = few.sizes.max_separators
    slots = np.arange(end - kept, end) % max(s, 1)
    places = few.kept_at[:, row][..., slots].astype(np.int64)
    places = seen - (int(few.seen_low[row]) - places) % few.sizes.count_wrap
    return CacheView(seen, sinks, kept, recent, nbytes, places)
