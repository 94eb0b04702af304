"""What the queries of a call see, apart from where they are: two ranges of keys each, in any two arrays of keys.

A layout's own rows are the plain case: near keys are the row, far keys its packed global keys. On a mesh whose axis
`context` splits the rows, a device has fewer queries than keys, and both arrays are put together from several devices.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from sepjax.array_typing import Array, InShapes
from sepjax.layout import SeparatorLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Ranges(InShapes):
    """Query i of a row sees the near keys [near_start, near_end) and the far keys [far_start, far_end).

    Nothing decreases along a row. A query whose two ranges are empty sees nothing.
    """

    far_start: Int32[Array, "B Q"]
    far_end: Int32[Array, "B Q"]
    near_start: Int32[Array, "B Q"]
    near_end: Int32[Array, "B Q"]
    num_far: Int32[Array, "B"]  # far keys of the row; what follows them in their array means nothing

    __no_type_check__ = True

    @property
    def queries(self) -> int:
        """Queries of a row."""
        return self.far_start.shape[1]

    def change(self, f: Callable[[Array], jax.Array]) -> "Ranges":
        """The ranges of other queries: `f` maps each int32[B, Q] to another number of them."""
        return Ranges(f(self.far_start), f(self.far_end), f(self.near_start), f(self.near_end), self.num_far)


def whole_rows(layout: SeparatorLayout) -> Ranges:
    """The ranges of all tokens of a layout's rows, in these rows and in their packed global keys."""
    end = jnp.arange(1, layout.length + 1, dtype=jnp.int32)
    end = jnp.broadcast_to(end, layout.near_start.shape)
    return Ranges(layout.far_start, layout.far_end, layout.near_start, end, layout.num_global)
