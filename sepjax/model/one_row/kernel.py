"""One decode step of one row in one kernel: all layers, all blocks at once, which hand each other their results.

    layer    norm, q, k, v  |  attention  |  join  |  output, +  |  norm, gate, up, activation  |  down, +

At each bar every block needs what all others have made. Nobody waits at a barrier for it: a result travels as a packet
of 32 bits (two bfloat16, or a float) and a flag, the number of the layer, written and read as one. Who reads it asks
again until the flag is there. So a hand-over is one write and one read of the L2.

A block has one warp that copies and eight that compute. What is copied (rows of matrices, tiles of the cache) is known
from the start, so that warp runs ahead through a ring in shared memory, as far as the ring is long, over all layers:
the memory is never idle while blocks wait for each other.

    copies     qkv . out . into . . . down . qkv . out ...      chunks, in the order in which they will be needed
    computes         qkv   attention   join   out   into ...

Nothing is overwritten before it was read, a packet or shared memory: what overwrites it depends on all results of a
later phase, and these on what its readers made of it. Where it depends on some alone there are two places in turns. All
blocks must run at the same time, one on each SM. What could keep some of them from it: another kernel that stays until
this one is done, such as a second one of these.
"""

import math
from collections.abc import Callable
from typing import Any

from sepjax.model.one_row.attention import Attention
from sepjax.model.one_row.copies import Copies
from sepjax.model.one_row.products import Products
from sepjax.model.one_row.shape import THREADS, WARPS

_LOG2E = math.log2(math.e)


class Kernel(Copies, Products, Attention):
    """What one thread does."""

    def run(self) -> None:
        """From the beginning to the end."""
        m = self.m
        m.when(m.same(m.thread, 0), self._begin)
        m.meet(0, THREADS + 32)
        m.when(m.same(m.warp, WARPS), lambda: m.when(m.same(m.lane, 0), self._copy_all))
        m.when(m.warp < WARPS, self._compute_all)

    def _begin(self) -> None:
        m, s = self.m, self.shape
        for i in range(s.stages):
            m.make_barrier(self.at["ready"] + 8 * i, 1)
            m.make_barrier(self.at["free"] + 8 * i, WARPS)
        for i in range(len(s.entries) * s.L):
            m.keep(self.at["addresses"] + 8 * i, m.address(i))
        m.made_barriers()

    def _compute_all(self) -> None:
        m, s = self.m, self.shape
        self.slot = m.load(m.address(self.given.slot))
        self._each_unit("out", self._begin_residual)
        self._begin_turns()

        def layer(i: Any, count: Any) -> list[Any]:
            flag = i + 1
            count = self._product("qkv", "x", i, count, "norm", self._send_pair("qkv", flag))
            count = self._attend(i, count, flag)
            self._join(flag)
            count = self._product("out", "attended", i, count, None, self._add("y", flag))
            count = self._product("into", "y", i, count, "mlp norm", self._activated(flag))
            count = self._product("down", "hidden", i, count, None, self._add("x", flag + 1))
            return [count]

        m.loop(0, s.L, 1, layer, m.integer(0))
        _, chunks = self._chunks_of(s.products["out"])
        m.when(chunks >= 1, self._end)

    def _begin_residual(self, unit: Any, local: Any) -> None:
        m = self.m
        (pair,) = m.receive([self._packet("x", unit)], m.integer(1))
        for i, x in enumerate((m.low_half(pair), m.high_half(pair))):
            m.keep(local * 8 + (self.at["residual"] + 4 * i), x)

    def _residual(self, local: Any) -> list[Any]:
        return [self.m.shared_float(local * 8 + (self.at["residual"] + 4 * i)) for i in range(2)]

    def _end(self) -> None:
        """The last norm, of what the block keeps."""
        m, s = self.m, self.shape
        weights = m.address(self.given.final_norm)
        self._gather("x", m.integer(s.L + 1), weights, self.at["squares"], None)
        factor = self._root(self.at["squares"])

        def unit(unit: Any, local: Any) -> None:
            scales = [m.as_float(m.load(weights + m.wide(unit * 8 + 4 * i))) for i in range(2)]
            x = [a * factor * b for a, b in zip(self._residual(local), scales, strict=True)]
            m.store(m.address(self.given.out) + m.wide(unit * 4), m.pair(*x))

        self._each_unit("out", unit)

    def _send_pair(self, name: str, flag: Any) -> Callable[..., None]:
        def send(unit: Any, local: Any, sums: list[Any]) -> None:
            self._send(name, unit, self.m.pair(*sums), flag)

        return send

    def _add(self, name: str, flag: Any) -> Callable[..., None]:
        def add(unit: Any, local: Any, sums: list[Any]) -> None:
            m = self.m
            new = [x + y for x, y in zip(self._residual(local), sums, strict=True)]
            for i, x in enumerate(new):
                m.keep(local * 8 + (self.at["residual"] + 4 * i), x)
            self._send(name, unit, m.pair(*new), flag)

        return add

    def _activated(self, flag: Any) -> Callable[..., None]:
        def send(unit: Any, local: Any, sums: list[Any]) -> None:
            m = self.m

            def silu(x: Any) -> Any:
                return x * m.reciprocal(m.exp2(x * -_LOG2E) + 1.0)

            gates, ups = sums[:2], sums[2:]
            self._send("hidden", unit, m.pair(*(silu(x) * y for x, y in zip(gates, ups, strict=True))), flag)

        return send
