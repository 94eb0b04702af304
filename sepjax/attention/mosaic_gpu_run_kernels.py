r"""Runs of tokens over the slots of a cache, on Hopper GPUs: what their blocks of queries visit.

The kernel is the forward one of `mosaic_gpu_kernels.py`; its blocks visit other keys. Virtual keys are chunks of 64:
first those tiles of slots in which some query of the row sees something, then the run itself up to the block's end.

    slots     . . [t2] . . [t5] [t6] . .         run    [0 .. 63] [64 .. 127] [128 .. ]
    virtual        t5    |  t2  |  t6  |  0 .. 63  |  64 .. 127 | -
                  partial:             :                   a block of the tokens 64 to 127 ends here
                 some query does not see some slot: masked, as the diagonal of the run is

Every key has a number, and a query sees those whose numbers are not below its own `first`; of the run moreover none
that comes after it. Keys of the first slots may be taken from another array, in which they are turned already.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sepjax.attention import mosaic_gpu_kernels as kernels
from sepjax.attention.mosaic_gpu_kernels import ROWS, Shape, Tiles

CHUNK = 64  # slots of a tile, and tokens of a run, that one copy loads
# In `order`: numbers of tiles, whether the run's keys have ends, the row of the slots, the tiles.
LIVE, PARTIAL, OWN_ENDS, PLACE, TILES = range(5)


class _Block(NamedTuple):
    """A block of queries: int32 scalars."""

    b: Any
    head: Any  # the first of Tiles.heads
    token: Any  # the first
    slots: Any  # virtual keys that are slots, which come first
    partial: Any  # and of these those in tiles that are masked
    place: Any  # the row of the slots
    own_ends: Any  # whether keys of the run are to be compared with `first`
    steps: Any  # tiles of virtual keys


class _Rows(NamedTuple):
    """What the rows of one warpgroup see: int32 scalars."""

    token: Any  # the first
    steps: Any  # tiles up to the last that a row sees


class _Sources(NamedTuple):
    """Where keys or values of slots are: [rows, K, C, H], and those of the first slots [B, K, A, H]."""

    slots: Any
    turned: Any  # None: no other than in `slots`
    first: int  # A


class RunBlocks(kernels._QueryBlocks):
    """All blocks of queries of a run over slots."""

    numbers = 2  # that a query has: `first`, and how many keys of the run it sees

    def __init__(self, shape: Shape, tiles: Tiles, ranges: Any, at: Any = None, order: Any = None):
        super().__init__(shape, tiles, ranges)
        self.at, self.order = at, order

    @classmethod
    def of_inputs(cls, shape: Shape, tiles: Tiles, *inputs: Any) -> tuple["RunBlocks", Any, Any]:
        """Of k and v of the run, those of slots, keys of the first slots or none, `at`, queries' numbers, `order`."""
        k, v, k_slots, v_slots, *turned, at, ranges, order = inputs
        size = turned[0].shape[2] if turned else 0
        far = _Sources(k_slots, turned[0] if turned else None, size), _Sources(v_slots, None, 0)
        return cls(shape, tiles, ranges, at, order), (k, v), far

    @staticmethod
    def copies(keys: int) -> tuple[int, int]:
        """Each chunk of keys comes with its numbers."""
        return 2 * (keys // CHUNK), keys // CHUNK

    @staticmethod
    def beside_keys(stages: int, keys: int) -> tuple[Any, ...]:
        """The keys' numbers."""
        return (plgpu.SMEM((stages, keys), jnp.int32),)

    def block(self, task: Any) -> Any:
        """Reads the scalars of a block."""
        group, rest = lax.rem(task, self.groups), lax.div(task, self.groups)
        b = lax.rem(rest, self.shape.B)
        token = (self.per_row - 1 - lax.div(rest, self.shape.B)) * self.tiles.tokens
        slots = self.order[b, LIVE] * CHUNK
        end = slots + jnp.minimum(token + self.tiles.tokens, self.shape.T)
        steps = jnp.maximum(pl.cdiv(end, self.tiles.keys), 1)
        partial, own_ends, place = self.order[b, PARTIAL] * CHUNK, self.order[b, OWN_ENDS], self.order[b, PLACE]
        return _Block(b, group * self.tiles.heads, token, slots, partial, place, own_ends, steps)

    def block_of(self, task: Any, wg: Any) -> tuple[Any, Any]:
        """The same, and what the rows of a warpgroup see."""
        block = self.block(task)
        _, token, _ = self.segments(block, wg)[0]
        steps = block.steps
        if self.tiles.tokens > ROWS:  # otherwise both warpgroups have the same tokens
            steps = jnp.minimum(pl.cdiv(block.slots + token + ROWS, self.tiles.keys), steps)
        return block, _Rows(token, steps)

    def load_tile(self, block: Any, near: Any, far: _Sources, tile: Any, ready: Any, step: Any) -> None:
        """Starts the copies of one tile: near [B, T, K, H]; tile: of keys, with a place for their numbers."""
        kv_head, chunks = lax.div(block.head, self.shape.group), self.tiles.keys // CHUNK
        tile, *numbers = tile if isinstance(tile, tuple) else (tile,)

        def copy(source, rows, number):
            plgpu.copy_gmem_to_smem(source, tile.at[rows], ready)
            for x in numbers:
                plgpu.copy_gmem_to_smem(self.at.at[block.b, pl.ds(number, CHUNK)], x.at[rows], ready)

        def slots(rows, c):
            number = self.order[block.b, TILES + c] * CHUNK
            of = lambda x, row: x.at[row, kv_head, pl.ds(number, CHUNK)]  # noqa: E731
            if far.turned is None:
                copy(of(far.slots, block.place), rows, number)
            else:
                pl.when(number < far.first)(lambda: copy(of(far.turned, block.b), rows, number))
                pl.when(number >= far.first)(lambda: copy(of(far.slots, block.place), rows, number))

        def own(rows, c):
            token = c * CHUNK - block.slots
            source = near.at[block.b, pl.ds(kernels._aligned(token), CHUNK), kv_head]
            copy(source, rows, self.shape.S + token)

        for i in range(chunks):
            c, rows = step * chunks + i, pl.ds(i * CHUNK, CHUNK)
            is_slot = c * CHUNK < block.slots
            pl.when(is_slot)(lambda c=c, rows=rows: slots(rows, c))
            pl.when(kernels._not(is_slot))(lambda c=c, rows=rows: own(rows, c))

    def mask(self, block: Any, rows: Any, mine: Any, short: bool = False) -> Any:
        """The function (scores, first virtual key, the keys' numbers) -> scores, -inf where a row does not see a key.

        `mine` has the rows' numbers, int32 [2, ROWS] in shared memory.
        """

        vector = lambda row: plgpu.load(mine.at[row], layout=kernels._PER_ROW)  # noqa: E731

        def causal(s, u0):
            u = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
            return jnp.where(u < kernels._along_rows(vector(1) + (block.slots - u0), s.shape), s, -jnp.inf)

        def both(s, u0, numbers):
            at = plgpu.load(numbers, layout=kernels._PER_COLUMN)
            seen = kernels._along_columns(at, s.shape) >= kernels._along_rows(vector(0), s.shape)
            return causal(jnp.where(seen, s, -jnp.inf), u0)

        def mask(s, u0, numbers):
            end = u0 + s.shape[1]
            by_numbers = (u0 < block.partial) | ((block.own_ends > 0) & (end > block.slots))
            is_late = end - 1 > block.slots + rows.token
            kind = jnp.where(by_numbers, 2, jnp.where(is_late, 1, 0))
            return lax.switch(kind, [lambda s: s, lambda s: causal(s, u0), lambda s: both(s, u0, numbers)], s)

        return mask
