"""The warp that copies: matrices and caches into the ring, in the order in which they will be needed."""

from typing import Any

from sepjax.model.one_row.block import Block
from sepjax.model.one_row.shape import TILE


class Copies(Block):
    """All of a block's copies, over all layers."""

    def _copy_all(self) -> None:
        m, s = self.m, self.shape

        def layer(i: Any, count: Any) -> list[Any]:
            count = self._copy_matrix("qkv", i, count)
            count = self._copy_tiles(i, count)
            for name in ("out", "into", "down"):
                count = self._copy_matrix(name, i, count)
            return [count]

        m.loop(0, s.L, 1, layer, m.integer(0))

    def _begin_copy(self, count: Any, size: int) -> tuple[Any, Any]:
        to, barrier, turn = self._place(count)
        self.m.wait(barrier + self.at["free"], (turn + 1) % 2)
        self.m.expect(barrier + self.at["ready"], size)
        return to, barrier + self.at["ready"]

    def _copy_matrix(self, name: str, layer: Any, count: Any) -> Any:
        m, product = self.m, self.shape.products[name]
        matrix = self._entry(layer, name)
        first, number = self._chunks_of(product)
        row, of_part = product.inputs * product.width, product.columns * product.width
        of_rows = product.units * 2 * of_part
        halves = product.rows // 2  # of "into" rows of the gate, and as many of up

        def chunk(i: Any, count: Any) -> list[Any]:
            unit = (first + i * product.blocks) * product.units
            for part in range(product.parts):
                to, barrier = self._begin_copy(count, product.bytes)
                for half in range(halves):
                    begin = matrix + m.wide(unit * 2 + half * product.U * 2) * m.wide(row)
                    if product.parts == 1:
                        m.copy(to + half * of_rows, begin, of_rows, barrier)
                        continue
                    for r in range(2 * product.units):
                        source = begin + m.wide(r * row + part * of_part)
                        place = to + (2 * product.units * half + r) * of_part
                        m.copy(place, source, of_part, barrier)
                count = count + 1
            return [count]

        return m.loop(0, number, 1, chunk, count)[0]

    def _copy_tiles(self, layer: Any, count: Any) -> Any:
        m, s = self.m, self.shape
        head, share, number = self._tiles()
        keys, values = self._entry(layer, "k"), self._entry(layer, "v")
        size = TILE * s.H * 2

        def tile(i: Any, count: Any) -> list[Any]:
            begin = m.wide((head * s.C + (share + i * s.splits) * TILE) * (s.H * 2))
            to, barrier = self._begin_copy(count, 2 * size)
            m.copy(to, keys + begin, size, barrier)
            m.copy(to + size, values + begin, size, barrier)
            return [count + 1]

        return m.loop(0, number, 1, tile, count)[0]
