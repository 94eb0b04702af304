"""What all warps of the kernel know: where things are, and which of them are their block's."""

from collections.abc import Callable, Iterator
from typing import Any

from sepjax.model.one_row.shape import PACKET, THREADS, TILE, Product, Shape


class Given:
    """Numbers of the arrays that a kernel is given: those of layers first, `Shape.entries` of each, then these."""

    def __init__(self, shape: Shape):
        first = len(shape.entries) * shape.L
        self.cos, self.sin, self.bias, self.slot, self.final_norm, self.packets, self.out = range(first, first + 7)


class Block:
    """What `Kernel` is made of. `m` is a `Warps`, or what stands for one in tests."""

    def __init__(self, shape: Shape, m: Any, strides: tuple[int, int]):
        self.shape, self.m, self.given = shape, m, Given(shape)
        self.at, self.new_strides = shape.shared_at, strides

    def _entry(self, layer: Any, name: str) -> Any:
        entries = self.shape.entries
        return self.m.shared_wide(layer * (8 * len(entries)) + (self.at["addresses"] + 8 * entries.index(name)))

    def _place(self, count: Any) -> tuple[Any, Any, Any]:
        """Of a chunk's number: its place in the ring, its barrier's offset, and how often the ring has gone round."""
        stage = count % self.shape.stages
        return stage * self.shape.stage + self.at["end"], stage * 8, count // self.shape.stages

    def _chunks_of(self, product: Product) -> tuple[Any, Any]:
        """The block's first chunk, and how many it has."""
        first = (self.m.block + (product.blocks - product.first)) % product.blocks
        return first, (self.m.integer(product.chunks + product.blocks - 1) - first) // product.blocks

    def _tiles(self) -> tuple[Any, Any, Any]:
        """The block's key head, its share, and the number of its tiles."""
        m, s = self.m, self.shape
        head, share = m.block // s.splits, m.block % s.splits
        number = (m.integer(s.C // TILE + s.splits - 1) - share) // s.splits
        return head, share, m.select(m.block < s.K * s.splits, number, 0)

    def _packet(self, name: str, i: Any) -> Any:
        return self.m.address(self.given.packets) + self.m.wide(i * PACKET + self.shape.packets_at[name])

    def _send(self, name: str, i: Any, bits: Any, flag: Any) -> None:
        self.m.send(self._packet(name, i), bits, flag)

    def _units(self, name: str) -> Iterator[tuple[Any, Any, Any]]:
        """Of each of the block's units, a thread each: whether the thread has one, which, and its number among them."""
        m, product = self.m, self.shape.products[name]
        first, chunks = self._chunks_of(product)
        for begin in range(0, product.most, THREADS):
            local = m.thread + begin
            unit = (first + local // product.units * product.blocks) * product.units + local % product.units
            yield m.both(local < chunks * product.units, unit < product.U), unit, local

    def _each_unit(self, name: str, body: Callable[[Any, Any], None]) -> None:
        """body(unit, its number among the block's) of each of the block's units, a thread each."""
        for there, unit, local in self._units(name):
            self.m.when(there, lambda local=local, unit=unit: body(unit, local))

    def _added(self, numbers: list[Any]) -> Any:
        while len(numbers) > 1:
            rest = numbers[len(numbers) // 2 * 2 :]
            numbers = [a + b for a, b in zip(numbers[::2], numbers[1::2], strict=False)] + rest
        return numbers[0]

    def _eight(self, at: Any) -> list[Any]:
        """Eight floats of shared memory."""
        return [self.m.as_float(x) for i in range(2) for x in self.m.shared_four(at + 16 * i)]
