"""Products of a block's rows of a matrix and a vector that all blocks have made."""

from collections.abc import Callable
from typing import Any

from sepjax.model.one_row.digits import Digits
from sepjax.model.one_row.shape import BLOCK, DIGITS, THREADS, WARPS, Product

_FEATURES = {"x": "features", "attended": "others", "y": "features", "hidden": "others"}  # where vectors are kept
_UNROLLED = 4  # blocks of columns
_TOGETHER = 4  # packets that a thread asks for at a time


class Products(Digits):
    """The products of the warps that compute."""

    def _product(
        self, name: str, source: str, layer: Any, count: Any, norm: str | None, finish: Callable[..., None]
    ) -> Any:
        """matrix @ norm(source), of the block's units; `finish` gets a unit's sums. Returns the ring's count."""
        m, product, codes = self.m, self.shape.products[name], self.shape.codes
        _, chunks = self._chunks_of(product)
        squares = None if norm is None else self.at["squares"] + (norm != "norm") * 4 * WARPS
        tops = self.at["tops"] + (name in ("out", "down")) * 4 * WARPS if codes else None
        flag, kept = layer + 1, self.at["digits" if codes else _FEATURES[source]]
        weights = None if norm is None else self._entry(layer, norm)
        # Read ahead, while results are on their way.
        ahead = [
            [self._of_rows(name, f"{name} {vector}", layer, m.select(there, unit, 0)) for vector in ("scales", "bias")]
            for there, unit, _ in self._units(name)
        ]

        def begin() -> None:
            self._gather(source, flag, weights, squares, tops)
            if tops is not None:
                self._make_digits(product, self.at[_FEATURES[source]], tops)

        m.when(chunks >= 1, begin)

        def chunk(i: Any, count: Any) -> list[Any]:
            return [self._chunk(product, i, count, kept)]

        (count,) = m.loop(0, chunks, 1, chunk, count)
        m.when(chunks >= 1, lambda: m.meet(1, THREADS))

        def unit(unit: Any, local: Any, scales: list[Any], biases: list[Any]) -> None:
            sums = self._sums(product, local)
            if tops is not None:
                factor = self._of_digits(tops)[1]
                sums = [x * (factor * y) for x, y in zip(sums, scales, strict=True)]
            if squares is not None:
                factor = self._root(squares)
                sums = [x * factor for x in sums]
            finish(unit, local, [x + y for x, y in zip(sums, biases, strict=True)] if biases else sums)

        for (there, i, local), of_unit in zip(self._units(name), ahead, strict=True):
            m.when(there, lambda i=i, local=local, of_unit=of_unit: unit(i, local, *of_unit))
        return count

    def _of_rows(self, name: str, vector: str, layer: Any, unit: Any) -> list[Any]:
        """What a vector has for a unit's rows, where layers have it."""
        m, product = self.m, self.shape.products[name]
        if vector not in self.shape.entries:
            return []
        begin = self._entry(layer, vector) + m.wide(unit * 8)
        places = [half * product.U * 8 + i * 4 for half in range(product.rows // 2) for i in range(2)]
        return [m.as_float(m.load(begin + x)) for x in places]

    def _sums(self, product: Product, local: Any) -> list[Any]:
        """Of a unit's rows, over all warps."""
        chunk, unit = local // product.units, local % product.units
        first = chunk * product.of_chunk + unit * 2
        rows = [first + (half * product.units * 2 + i) for half in range(product.rows // 2) for i in range(2)]
        return [self._added(self._eight(row * (4 * WARPS) + self.at["sums"])) for row in rows]

    def _root(self, squares: int) -> Any:
        """What a norm multiplies by, of the sums of squares of all warps."""
        total = self._added(self._eight(squares))
        return self.m.rsqrt(total * (1.0 / self.shape.D) + self.shape.epsilon)

    def _gather(self, source: str, flag: Any, weights: Any, squares: int | None, tops: int | None) -> None:
        """A vector from packets into shared memory, of a norm times its weights; the sums of its squares; and what is
        largest among the bits of the results without their signs.
        """
        m, size = self.m, self.shape.packets[source]
        together = _TOGETHER * THREADS

        def whole(begin: Any, *found: Any) -> list[Any]:
            return self._take(source, flag, weights, begin, _TOGETHER, list(found))

        found = [m.float(0.0), *([] if tops is None else [m.integer(0)])]
        found = m.loop(0, size // together * together, together, whole, *found)
        if size % together:
            begin = m.integer(size // together * together)
            found = self._take(source, flag, weights, begin, -(-(size % together) // THREADS), found)
        total, *top = found
        if tops is not None:
            self._keep_top(top[0], tops)
        if squares is not None:
            for distance in (16, 8, 4, 2, 1):
                total = total + m.from_lane_xor(total, distance)
            m.when(m.same(m.lane, 0), lambda: m.keep(m.warp * 4 + squares, total))
        m.meet(1, THREADS)

    def _take(self, source: str, flag: Any, weights: Any, begin: Any, number: int, state: list[Any]) -> list[Any]:
        """So many packets of each thread; returns the sum of squares, and what is largest if it was given."""
        m, size = self.m, self.shape.packets[source]
        total, *top = state
        places = [m.thread + (begin + i * THREADS) for i in range(number)]
        inside = [x < size for x in places]
        # Who has none left asks for its first again, and not all of them for the same one: that would hold up the L2.
        other = m.thread if size >= THREADS else m.thread % size
        at = [m.select(there, x, other) for x, there in zip(places, inside, strict=True)]
        factors: list[Any] = [None] * number
        if weights is not None:
            factors = [[m.as_float(m.load(weights + m.wide(x * 8 + 4 * i))) for i in range(2)] for x in at]
        found = m.receive([self._packet(source, x) for x in at], flag)
        for pair, x, there, factor in zip(found, at, inside, factors, strict=True):
            if factor is not None:
                low, high = m.low_half(pair), m.high_half(pair)
                total = total + m.select(there, low * low + high * high, 0.0)
                pair = m.pair(low * factor[0], high * factor[1])
            m.keep(x * 4 + self.at[_FEATURES[source]], pair)  # of a place twice, the same bits
            top = [self._larger_of_bits(x, pair) for x in top]
        return [total, *top]

    def _chunk(self, product: Product, i: Any, count: Any, features: Any) -> Any:
        """A chunk's rows times the features, into "sums": every warp has some of the columns.

        Rows are those of the left factor of a tensor core, the features columns of the right one. Which numbers of a
        row are its k-th is free, if the features' are the same: a lane takes 8 in a row. Of 64 numbers even rows take
        the first 32 first and odd rows the others, so that lanes read from different banks; even columns of the right
        factor have the features in the order of even rows, odd ones in that of odd rows, and of each row one counts.

        Of codes a lane takes 16 in a row, and columns 2 i and 2 i + 1 have digit i of the features (`Digits`).
        """
        m, codes = self.m, self.shape.codes
        lane, row = m.lane // 4, product.columns * product.width
        tiles = range(0, product.of_chunk, 16)
        sums = [m.integer(0) if codes else m.float(0.0) for _ in tiles for _ in range(8)]
        number_of, ragged, multiply = -(-row // BLOCK), row % BLOCK > 0, m.code_products if codes else m.products
        features = m.integer(features)
        if codes:
            features = features + m.select(lane // 2 < DIGITS, lane // 2, DIGITS - 1) * product.inputs
        for part in range(product.parts):
            place, barrier, turn = self._place(count)
            m.wait(barrier + self.at["ready"], turn % 2)
            rows = [self._row(lane + x, x + 8, product.of_chunk) for x in range(0, product.of_chunk, 8)]
            begins = [place + x * row for x in rows]

            def block(number: Any, *sums: Any, begins: Any = begins, part: int = part) -> list[Any]:
                found, inside = list(sums), number < number_of
                at = number * BLOCK + m.lane % 4 * 16
                if number_of % WARPS:
                    at = m.select(inside, at, 0)
                for half in range(2):
                    # Rows of half a block more begin in different banks by themselves.
                    to = at + (half * (BLOCK // 2) if ragged else (lane + half) % 2 * (BLOCK // 2))
                    if ragged and half:
                        inside = m.both(inside, to < row)
                        to = m.select(inside, to, 0)
                    x = m.shared_four(features + (to + part * row))
                    if number_of % WARPS or (ragged and half):
                        x = [m.select(inside, y, 0) for y in x]
                    for n, _ in enumerate(tiles):
                        both = [m.shared_four(begin + to) for begin in begins[2 * n : 2 * n + 2]]
                        first, second = both if len(both) > 1 else (both[0], [m.integer(0)] * 4)
                        for j in range(2):
                            a = first[2 * j], second[2 * j], first[2 * j + 1], second[2 * j + 1]
                            of = slice(8 * n + 4 * j, 8 * n + 4 * j + 4)
                            found[of] = multiply(a, x[2 * j : 2 * j + 2], found[of])
                return found

            sums = self._over_blocks(product, block, sums)
            m.arrive_warp(barrier + self.at["free"])
            count = count + 1
        for n, first in enumerate(tiles):
            for half in range(2 if first + 8 < product.of_chunk else 1):
                columns = [sums[8 * n + 2 * half + j] + sums[8 * n + 4 + 2 * half + j] for j in range(2)]
                found = m.select(m.same(lane % 2, 0), *columns)
                found = self._number_of_digits(found) if codes else found
                of_row = lane + (first + 8 * half)
                at = ((i * product.of_chunk + of_row) * WARPS + m.warp) * 4 + self.at["sums"]
                writes = m.both(m.same(m.lane % 4, 0), of_row < product.of_chunk)
                m.when(writes, lambda at=at, found=found: m.keep(at, found))
        return count

    def _row(self, row: Any, end: int, number: int) -> Any:
        return row if end <= number else self.m.select(row < number, row, number - 1)

    def _over_blocks(self, product: Product, block: Callable[..., Any], sums: list[Any]) -> list[Any]:
        """block(number, *sums) of all of a warp's columns."""
        m, number = self.m, product.rounds
        whole = number // _UNROLLED * _UNROLLED if number > 2 * _UNROLLED else 0

        def several(begin: Any, *sums: Any) -> list[Any]:
            for i in range(_UNROLLED):
                sums = block((begin + i) * WARPS + m.warp, *sums)
            return list(sums)

        if whole:
            sums = m.loop(0, whole, _UNROLLED, several, *sums)
        for i in range(whole, number):
            sums = block(m.warp + i * WARPS, *sums)
        return sums
