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
later phase, and these on what its readers made of it. Where it depends on some alone there are two places in turns. All blocks must run at the same time, one on each SM. What could keep some of them from
it: another kernel that stays until this one is done, such as a second one of these.
"""

import math
from collections.abc import Callable
from typing import Any

from sepjax.model.one_row.shape import COLUMNS, ENTRIES, PACKET, THREADS, TILE, WARPS, WEIGHTS, Product, Shape

QKV, OUT, INTO, DOWN, NORM, MLP_NORM, K_CACHE, V_CACHE, K_NEW, V_NEW = range(ENTRIES)
LOG2E = math.log2(math.e)
_FEATURES = {"x": "features", "attended": "others", "y": "features", "hidden": "others"}  # where vectors are kept
_UNROLLED = 4  # blocks of columns
_TOGETHER = 4  # packets that a thread asks for at a time
_LOWEST = -1e30  # below every score, and finite


class Given:
    """Numbers of the arrays that a kernel is given: those of layers first, ENTRIES each, then these."""

    def __init__(self, shape: Shape):
        first = ENTRIES * shape.L
        self.cos, self.sin, self.bias, self.slot, self.final_norm, self.packets, self.out = range(first, first + 7)


class Kernel:
    """What one thread does."""

    def __init__(self, shape: Shape, m: Any, strides: tuple[int, int]):
        self.shape, self.m, self.given = shape, m, Given(shape)
        self.at, self.new_strides = shape.shared_at, strides
        self.numbers = {"qkv": QKV, "out": OUT, "into": INTO, "down": DOWN}

    def run(self) -> None:
        m, s = self.m, self.shape
        m.when(m.same(m.thread, 0), self._begin)
        m.meet(0, THREADS + 32)
        m.when(m.same(m.warp, WARPS), lambda: m.when(m.same(m.lane, 0), self._copy_all))
        m.when(m.warp < WARPS, self._compute_all)

    def _begin(self) -> None:
        m, s = self.m, self.shape
        for i in range(s.stages):
            m.make_barrier(self.at["ready"] + 8 * i, 1)
            m.make_barrier(self.at["free"] + 8 * i, WARPS)
        for i in range(ENTRIES * s.L):
            m.keep(self.at["addresses"] + 8 * i, m.address(i))
        m.made_barriers()

    def _entry(self, layer: Any, which: int) -> Any:
        return self.m.shared_wide(layer * (8 * ENTRIES) + (self.at["addresses"] + 8 * which))

    # -- the warp that copies ---------------------------------------------------------------------------------------

    def _copy_all(self) -> None:
        m, s = self.m, self.shape

        def layer(i: Any, count: Any) -> list[Any]:
            count = self._copy_matrix("qkv", i, count)
            count = self._copy_tiles(i, count)
            for name in ("out", "into", "down"):
                count = self._copy_matrix(name, i, count)
            return [count]

        m.loop(0, s.L, 1, layer, m.integer(0))

    def _place(self, count: Any) -> tuple[Any, Any, Any]:
        """Of a chunk's number: its place in the ring, its barrier's offset, and how often the ring has gone round."""
        stage = count % self.shape.stages
        return stage * self.shape.stage + self.at["end"], stage * 8, count // self.shape.stages

    def _begin_copy(self, count: Any, size: int) -> tuple[Any, Any]:
        to, barrier, turn = self._place(count)
        self.m.wait(barrier + self.at["free"], (turn + 1) % 2)
        self.m.expect(barrier + self.at["ready"], size)
        return to, barrier + self.at["ready"]

    def _chunks_of(self, product: Product) -> tuple[Any, Any]:
        """The block's first chunk, and how many it has."""
        first = (self.m.block + (product.blocks - product.first)) % product.blocks
        return first, (self.m.integer(product.chunks + product.blocks - 1) - first) // product.blocks

    def _copy_matrix(self, name: str, layer: Any, count: Any) -> Any:
        m, product = self.m, self.shape.products[name]
        matrix = self._entry(layer, self.numbers[name])
        first, number = self._chunks_of(product)
        row, of_rows = product.inputs * 2, product.units * 2 * product.columns * 2
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
                        source = begin + m.wide(r * row + part * product.columns * 2)
                        place = to + (2 * product.units * half + r) * (product.columns * 2)
                        m.copy(place, source, product.columns * 2, barrier)
                count = count + 1
            return [count]

        return m.loop(0, number, 1, chunk, count)[0]

    def _tiles(self) -> tuple[Any, Any, Any]:
        """The block's key head, its share, and the number of its tiles."""
        m, s = self.m, self.shape
        head, share = m.block // s.splits, m.block % s.splits
        number = (m.integer(s.C // TILE + s.splits - 1) - share) // s.splits
        return head, share, m.select(m.block < s.K * s.splits, number, 0)

    def _copy_tiles(self, layer: Any, count: Any) -> Any:
        m, s = self.m, self.shape
        head, share, number = self._tiles()
        keys, values = self._entry(layer, K_CACHE), self._entry(layer, V_CACHE)
        size = TILE * s.H * 2

        def tile(i: Any, count: Any) -> list[Any]:
            begin = m.wide((head * s.C + (share + i * s.splits) * TILE) * (s.H * 2))
            to, barrier = self._begin_copy(count, 2 * size)
            m.copy(to, keys + begin, size, barrier)
            m.copy(to + size, values + begin, size, barrier)
            return [count + 1]

        return m.loop(0, number, 1, tile, count)[0]

    # -- the warps that compute -------------------------------------------------------------------------------------

    def _compute_all(self) -> None:
        m, s = self.m, self.shape
        self.slot = m.load(m.address(self.given.slot))
        self._each_unit("out", self._begin_residual)
        self._begin_turns()

        def layer(i: Any, count: Any) -> list[Any]:
            flag = i + 1
            self._stamp(i, 0)
            count = self._product("qkv", "x", i, count, NORM, self._send_pair("qkv", flag))
            self._stamp(i, 1)
            count = self._attend(i, count, flag)
            self._stamp(i, 2)
            self._join(flag)
            self._stamp(i, 3)
            count = self._product("out", "attended", i, count, None, self._add("y", flag))
            self._stamp(i, 4)
            count = self._product("into", "y", i, count, MLP_NORM, self._activated(flag))
            self._stamp(i, 5)
            count = self._product("down", "hidden", i, count, None, self._add("x", flag + 1))
            return [count]

        m.loop(0, s.L, 1, layer, m.integer(0))
        _, chunks = self._chunks_of(s.products["out"])
        m.when(chunks >= 1, self._end)

    stamps: int | None = None  # number of an array for times

    def _stamp(self, layer: Any, which: int) -> None:
        m = self.m
        if self.stamps is not None:
            at = m.address(self.stamps) + m.wide(((m.block * self.shape.L + layer) * 16 + which) * 4)
            m.when(m.same(m.thread, 0), lambda: m.store(at, m.clock()))

    def _packet(self, name: str, i: Any) -> Any:
        return self.m.address(self.given.packets) + self.m.wide(i * PACKET + self.shape.packets_at[name])

    def _send(self, name: str, i: Any, bits: Any, flag: Any) -> None:
        self.m.send(self._packet(name, i), bits, flag)

    def _begin_turns(self) -> None:
        """Cosines and sines of all zones, into shared memory."""
        m, size = self.m, self.shape.zones * self.shape.H // 2
        for begin in range(0, 2 * size, THREADS):
            i = m.thread + begin

            def take(i: Any = i) -> None:
                table = m.select(i < size, m.address(self.given.cos), m.address(self.given.sin))
                m.keep(i * 4 + self.at["turns"], m.load(table + m.wide(i % size * 4)))

            m.when(i < 2 * size, take)

    def _each_unit(self, name: str, body: Callable[[Any, Any], None]) -> None:
        """body(unit, its number among the block's) of each of the block's units, a thread each."""
        m, product = self.m, self.shape.products[name]
        first, chunks = self._chunks_of(product)
        for begin in range(0, product.most, THREADS):
            local = m.thread + begin
            unit = (first + local // product.units * product.blocks) * product.units + local % product.units
            there = m.both(local < chunks * product.units, unit < product.U)
            m.when(there, lambda local=local, unit=unit: body(unit, local))

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
        self._gather("x", m.integer(s.L + 1), weights, self.at["squares"])
        factor = self._root(self.at["squares"])

        def unit(unit: Any, local: Any) -> None:
            scales = [m.as_float(m.load(weights + m.wide(unit * 8 + 4 * i))) for i in range(2)]
            x = [a * factor * b for a, b in zip(self._residual(local), scales, strict=True)]
            m.store(m.address(self.given.out) + m.wide(unit * 4), m.pair(*x))

        self._each_unit("out", unit)

    def _root(self, squares: int) -> Any:
        """What a norm multiplies by, of the sums of squares of all warps."""
        total = self._added(self._eight(squares))
        return self.m.rsqrt(total * (1.0 / self.shape.D) + self.shape.epsilon)

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
                return x * m.reciprocal(m.exp2(x * -LOG2E) + 1.0)

            gates, ups = sums[:2], sums[2:]
            self._send("hidden", unit, m.pair(*(silu(x) * y for x, y in zip(gates, ups, strict=True))), flag)

        return send

    # -- a product ----------------------------------------------------------------------------------------------------

    def _product(
        self, name: str, source: str, layer: Any, count: Any, norm: int | None, finish: Callable[..., None]
    ) -> Any:
        """matrix @ norm(source), of the block's units; `finish` gets a unit's sums. Returns the ring's count."""
        m, product = self.m, self.shape.products[name]
        _, chunks = self._chunks_of(product)
        squares = None if norm is None else self.at["squares"] + (norm - NORM) * 4 * WARPS
        flag = layer + 1
        weights = None if norm is None else self._entry(layer, norm)
        m.when(chunks >= 1, lambda: self._gather(source, flag, weights, squares))

        def chunk(i: Any, count: Any) -> list[Any]:
            return [self._chunk(product, i, count, self.at[_FEATURES[source]])]

        (count,) = m.loop(0, chunks, 1, chunk, count)
        m.when(chunks >= 1, lambda: m.meet(1, THREADS))

        def unit(unit: Any, local: Any) -> None:
            sums, factor = self._sums(product, local), None if squares is None else self._root(squares)
            finish(unit, local, sums if factor is None else [x * factor for x in sums])

        self._each_unit(name, unit)
        return count

    def _added(self, numbers: list[Any]) -> Any:
        while len(numbers) > 1:
            rest = numbers[len(numbers) // 2 * 2 :]
            numbers = [a + b for a, b in zip(numbers[::2], numbers[1::2], strict=False)] + rest
        return numbers[0]

    def _sums(self, product: Product, local: Any) -> list[Any]:
        """Of a unit's rows, over all warps."""
        chunk, unit = local // product.units, local % product.units
        first = chunk * product.of_chunk + unit * 2
        rows = [first + (half * product.units * 2 + i) for half in range(product.rows // 2) for i in range(2)]
        return [self._added(self._eight(row * (4 * WARPS) + self.at["sums"])) for row in rows]

    def _gather(self, source: str, flag: Any, weights: Any, squares: int | None) -> None:
        """A vector from packets into shared memory, of a norm times its weights; and the sums of its squares."""
        m, size = self.m, self.shape.packets[source]
        together = _TOGETHER * THREADS

        def whole(begin: Any, total: Any) -> list[Any]:
            return [self._take(source, flag, weights, begin, _TOGETHER, total)]

        (total,) = m.loop(0, size // together * together, together, whole, m.float(0.0))
        if size % together:
            begin = m.integer(size // together * together)
            total = self._take(source, flag, weights, begin, -(-(size % together) // THREADS), total)
        if squares is not None:
            for distance in (16, 8, 4, 2, 1):
                total = total + m.from_lane_xor(total, distance)
            m.when(m.same(m.lane, 0), lambda: m.keep(m.warp * 4 + squares, total))
        m.meet(1, THREADS)

    def _take(self, source: str, flag: Any, weights: Any, begin: Any, number: int, total: Any) -> Any:
        """So many packets of each thread; returns the sum of squares."""
        m, size = self.m, self.shape.packets[source]
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
        return total

    def _chunk(self, product: Product, i: Any, count: Any, features: int) -> Any:
        """A chunk's rows times the features, into "sums": every warp has some of the columns.

        Rows are those of the left factor of a tensor core, the features columns of the right one. Which numbers of a row
        are its k-th is free, if the features' are the same: a lane takes 8 in a row. Of 64 numbers even rows take the
        first 32 first and odd rows the others, so that lanes read from different banks; even columns of the right
        factor have the features in the order of even rows, odd ones in that of odd rows, and of each row one counts.
        """
        m = self.m
        lane, row = m.lane // 4, product.columns * 2
        tiles = range(0, product.of_chunk, 16)
        sums = [m.float(0.0) for _ in tiles for _ in range(8)]
        for part in range(product.parts):
            place, barrier, turn = self._place(count)
            m.wait(barrier + self.at["ready"], turn % 2)
            rows = [self._row(lane + x, x + 8, product.of_chunk) for x in range(0, product.of_chunk, 8)]
            begins = [place + x * row for x in rows]

            def block(number: Any, *sums: Any, begins: Any = begins, part: int = part) -> list[Any]:
                found, number_of = list(sums), product.columns // COLUMNS
                at = number * (2 * COLUMNS) + m.lane % 4 * 16
                if number_of % WARPS:
                    at = m.select(number < number_of, at, 0)
                for half in range(2):
                    to = at + (lane + half) % 2 * COLUMNS
                    x = m.shared_four(to + (features + part * row))
                    if number_of % WARPS:
                        x = [m.select(number < number_of, y, 0) for y in x]
                    for n, _ in enumerate(tiles):
                        both = [m.shared_four(begin + to) for begin in begins[2 * n : 2 * n + 2]]
                        first, second = both if len(both) > 1 else (both[0], [m.integer(0)] * 4)
                        for j in range(2):
                            a = first[2 * j], second[2 * j], first[2 * j + 1], second[2 * j + 1]
                            of = slice(8 * n + 4 * j, 8 * n + 4 * j + 4)
                            found[of] = m.products(a, x[2 * j : 2 * j + 2], found[of])
                return found

            sums = self._over_blocks(product, block, sums)
            m.arrive_warp(barrier + self.at["free"])
            count = count + 1
        for n, first in enumerate(tiles):
            for half in range(2 if first + 8 < product.of_chunk else 1):
                columns = [sums[8 * n + 2 * half + j] + sums[8 * n + 4 + 2 * half + j] for j in range(2)]
                found = m.select(m.same(lane % 2, 0), *columns)
                of_row = lane + (first + 8 * half)
                at = ((i * product.of_chunk + of_row) * WARPS + m.warp) * 4 + self.at["sums"]
                writes = m.both(m.same(m.lane % 4, 0), of_row < product.of_chunk)
                m.when(writes, lambda at=at, found=found: m.keep(at, found))
        return count

    def _row(self, row: Any, end: int, number: int) -> Any:
        return row if end <= number else self.m.select(row < number, row, number - 1)

    def _over_blocks(self, product: Product, block: Callable[..., Any], sums: list[Any]) -> list[Any]:
        """block(number, *sums) of all of a warp's columns."""
        m, number = self.m, -(-product.columns // COLUMNS // WARPS)
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

    # -- attention ----------------------------------------------------------------------------------------------------

    def _attend(self, layer: Any, count: Any, flag: Any) -> Any:
        """A share of a key head's slots, its sums sent as "shares". Returns the ring's count."""
        m, s = self.m, self.shape
        head, share, tiles = self._tiles()
        takes_part = m.block < s.K * s.splits
        m.when(takes_part, lambda: self._queries(layer, head, share, flag))
        begin = [m.float(x) for x in (_LOWEST, *[0.0] * (1 + s.G * s.H // 32))]

        def tile(i: Any, count: Any, *state: Any) -> list[Any]:
            return [count + 1, *self._tile(share + i * s.splits, count, list(state))]

        count, *state = m.loop(0, tiles, 1, tile, count, *begin)
        m.when(takes_part, lambda: self._send_shares(state, head, share, flag))
        return count

    def _queries(self, layer: Any, head: Any, share: Any, flag: Any) -> None:
        """The head's queries turned to fit each zone, its own key and value, which are written into the cache."""
        m, s = self.m, self.shape
        quarter = s.H // 4  # a thread has two packets of a vector, which turn each other
        total = (s.G + 2) * quarter
        for begin in range(0, total, THREADS):
            i = m.thread + begin
            m.when(i < total, lambda i=i: self._turn(layer, head, share, flag, i // quarter, i % quarter))
        m.meet(1, THREADS)

        def own_score() -> None:
            dot = m.float(0.0)
            query = ((s.zones - 1) * 8 + m.warp) * (s.H * 2) + self.at["queries"]
            for begin in range(0, s.H // 2, 32):
                words = [m.shared(at + (m.lane + begin) * 4) for at in (query, m.integer(self.at["own"]))]
                (a, b), (c, d) = ((m.low_half(x), m.high_half(x)) for x in words)
                dot = m.fma(b, d, m.fma(a, c, dot))
            for distance in (16, 8, 4, 2, 1):
                dot = dot + m.from_lane_xor(dot, distance)
            m.when(m.same(m.lane, 0), lambda: m.keep(m.warp * 4 + self.at["own_scores"], dot * self._scale))

        m.when(m.both(m.same(share, 0), m.warp < s.G), own_score)

    @property
    def _scale(self) -> float:
        return self.shape.H**-0.5 * LOG2E

    def _turn(self, layer: Any, head: Any, share: Any, flag: Any, which: Any, j: Any) -> None:
        """Packets j and H / 4 + j of a vector: of a query, the key behind them or the value behind that."""
        m, s, quarter, half = self.m, self.shape, self.shape.H // 4, self.shape.H // 2
        of_new = head + (s.N - s.K) + (which - (s.G - 1)) * s.K  # keys stand after all queries, then values
        packet = m.select(which < s.G, head * s.G + which, of_new) * half + j
        pairs = m.receive([self._packet("qkv", packet + x) for x in (0, quarter)], flag)
        (a, b), (c, d) = ((m.low_half(x), m.high_half(x)) for x in pairs)

        def turned(zone: int) -> tuple[Any, Any]:
            at = j * 8 + (zone * half * 4 + self.at["turns"])
            (cos, other_cos), (sin, other_sin) = (
                [m.shared_float(at + (x + y)) for y in (0, 4)] for x in (0, 4 * s.zones * half)
            )
            first = m.pair(a * cos - c * sin, b * other_cos - d * other_sin)
            return first, m.pair(c * cos + a * sin, d * other_cos + b * other_sin)

        def keep(at: Any, words: Any) -> None:
            for i, word in enumerate(words):
                m.keep(at + (j + i * quarter) * 4, word)

        def query() -> None:
            for zone in range(s.zones):
                keep((which + zone * 8) * (s.H * 2) + self.at["queries"], turned(zone))

        def new(words: Any, number: int, entry: int) -> None:
            keep(m.integer(self.at["own"] + number * s.H * 2), words)
            place = head * self.new_strides[0] + self.slot * self.new_strides[1]
            address = self._entry(layer, entry) + m.wide(place * 2)
            for i, word in enumerate(words):
                to = address + m.wide((j + i * quarter) * 4)
                m.when(m.same(share, 0), lambda to=to, word=word: m.store(to, word))

        m.when(which < s.G, query)
        m.when(m.same(which, s.G), lambda: new(turned(s.zones - 1), 0, K_NEW))
        m.when(m.same(which, s.G + 1), lambda: new(pairs, 1, V_NEW))

    def _eight(self, at: Any) -> list[Any]:
        """Eight floats of shared memory."""
        return [self.m.as_float(x) for i in range(2) for x in self.m.shared_four(at + 16 * i)]

    def _tile(self, number: Any, count: Any, state: list[Any]) -> list[Any]:
        """The state after the slots of a tile, 8 a warp: of lane 4 g + t query g's maximum and part of the sum of its
        weights, and of all queries sums of the lane's numbers of values.
        """
        m, s = self.m, self.shape
        slots = [number * TILE + m.warp * 8 + m.lane % 4 * 2 + i for i in range(2)]
        biases = [m.as_float(m.load(m.address(self.given.bias) + m.wide(x * 4))) for x in slots]
        place, barrier, turn = self._place(count)
        m.wait(barrier + self.at["ready"], turn % 2)
        scores = [a * self._scale + b for a, b in zip(self._scores(place, slots), biases, strict=True)]
        top, total, *sums = state
        new = m.larger(scores[0], scores[1])
        for distance in (1, 2):
            new = m.larger(new, m.from_lane_xor(new, distance))
        new = m.larger(new, top)
        shrink, weights = m.exp2(top - new), [m.exp2(x - new) for x in scores]
        total = m.fma(total, shrink, weights[0] + weights[1])
        mine = m.warp * WEIGHTS + self.at["weights"]
        for i, x in enumerate(weights):
            m.keep(mine + (m.lane % 4 * 2 + i) * 32 + m.lane // 4 * 4, x)
        m.when(m.same(m.lane % 4, 0), lambda: m.keep(mine + m.lane // 4 * 4 + 256, shrink))
        m.meet_warp()
        sums = self._weighed(mine, place, sums)
        m.arrive_warp(barrier + self.at["free"])
        return [new, total, *sums]

    def _scores(self, place: Any, slots: list[Any]) -> list[Any]:
        """Products of query lane // 4 with the keys of two slots, as their zone has it."""
        m, s = self.m, self.shape
        key = place + (m.warp * 8 + m.lane // 4) * (s.H * 2) + m.lane % 4 * 16
        keys = [m.shared_four(key + 64 * i) for i in range(s.H // 32)]
        found: list[Any] = []
        for zone in range(s.zones):
            query = (m.lane // 4 + zone * 8) * (s.H * 2) + m.lane % 4 * 16 + self.at["queries"]
            of_zone = [m.float(0.0)] * 4
            for i, b in enumerate(keys):
                a, none = m.shared_four(query + 64 * i), m.integer(0)
                for j in (0, 2):
                    of_zone = m.products((a[j], none, a[j + 1], none), b[j : j + 2], of_zone)
            if found:
                end = s.ends[zone - 1]
                found = [m.select(x < end, a, b) for x, a, b in zip(slots, found, of_zone[:2], strict=True)]
            else:
                found = of_zone[:2]
        return found

    def _weighed(self, mine: Any, place: Any, sums: list[Any]) -> list[Any]:
        """The sums of values, of which a lane has H / 32 numbers, after 8 more slots."""
        m, s = self.m, self.shape
        each, fours = s.H // 32, -(-s.G // 4)

        def of_queries(row: int) -> list[Any]:
            return [m.as_float(x) for i in range(fours) for x in m.shared_four(mine + (row * 32 + 16 * i))][: s.G]

        value = place + m.warp * (8 * s.H * 2) + m.lane * (2 * each) + TILE * s.H * 2
        sums = [x * y for y, g in zip(of_queries(8), range(s.G), strict=True) for x in sums[each * g : each * (g + 1)]]
        for row in range(8):
            words = [m.shared(value + (row * s.H * 2 + 4 * i)) for i in range(each // 2)]
            values = [x for word in words for x in (m.low_half(word), m.high_half(word))]
            weights = of_queries(row)
            sums = [m.fma(weights[i // each], values[i % each], x) for i, x in enumerate(sums)]
        return sums

    def _send_shares(self, state: list[Any], head: Any, share: Any, flag: Any) -> None:
        """Joins what the warps of a block have seen, and sends it: H sums, maximum and total of a query."""
        m, s = self.m, self.shape
        each, width, first = s.H // 32, s.H + 2, self.at["features"]
        top, total, *sums = state
        for distance in (1, 2):
            total = total + m.from_lane_xor(total, distance)
        for i, x in enumerate(sums):
            m.keep((m.warp * s.G + i // each) * (4 * width) + m.lane * (4 * each) + (first + i % each * 4), x)

        def keep() -> None:
            at = (m.warp * s.G + m.lane // 4) * (4 * width) + (first + s.H * 4)
            m.keep(at, top)
            m.keep(at + 4, total)

        m.when(m.both(m.same(m.lane % 4, 0), m.lane < 4 * s.G), keep)
        m.meet(1, THREADS)
        number = s.G * width
        for begin in range(0, number, THREADS):
            i = m.thread + begin
            m.when(i < number, lambda i=i: self._send_share(head, share, flag, i // width, i % width))

    def _send_share(self, head: Any, share: Any, flag: Any, query: Any, x: Any) -> None:
        m, s = self.m, self.shape
        width, first = s.H + 2, self.at["features"]
        places = [(query + w * s.G) * (4 * width) + first for w in range(WARPS)]
        own = m.select(m.same(share, 0), m.shared_float(query * 4 + self.at["own_scores"]), _LOWEST)
        tops = [m.shared_float(at + s.H * 4) for at in places]
        top = own
        for other in tops:
            top = m.larger(top, other)
        sums = [m.shared_float(at + x * 4) * m.exp2(other - top) for at, other in zip(places, tops, strict=True)]
        in_value = m.select(x < s.H, x, 0)
        word = m.shared(in_value // 2 * 4 + (self.at["own"] + s.H * 2))
        value = m.select(m.same(in_value % 2, 0), m.low_half(word), m.high_half(word))
        weight = m.select(m.same(share, 0), m.exp2(own - top), 0.0)
        found = m.fma(weight, m.select(x < s.H, value, 1.0), self._added(sums))
        found = m.select(m.same(x, s.H), top, found)
        packet = ((head * s.splits + share) * s.G + query) * width + x
        self._send("shares", packet, m.as_bits(found), flag)

    def _joined(self, a: list[Any], b: list[Any]) -> list[Any]:
        m, top = self.m, self.m.larger(a[0], b[0])
        of_a, of_b = m.exp2(a[0] - top), m.exp2(b[0] - top)
        return [top, *(m.fma(x, of_a, y * of_b) for x, y in zip(a[1:], b[1:], strict=True))]

    def _join(self, flag: Any) -> None:
        """Shares as one softmax, a pair of numbers to half a warp."""
        m, s = self.m, self.shape
        half, pairs, width = s.H // 2, s.N * s.H // 2, s.H + 2
        for begin in range(0, pairs, 2 * WARPS * s.blocks):
            first = (m.block * WARPS + m.warp) * 2 + begin

            def join(first: Any = first) -> None:
                unit = first + m.lane // 16
                query, pair = unit // half, unit % half
                found: list[Any] = []
                for more in range(0, s.splits, 16):
                    share = m.lane % 16 + more
                    there = share < s.splits
                    share = m.select(there, share, 0)
                    of_query = ((query // s.G * s.splits + share) * s.G + query % s.G) * width
                    places = [of_query + pair * 2, of_query + pair * 2 + 1, of_query + s.H, of_query + s.H + 1]
                    got = m.receive([self._packet("shares", x) for x in places], flag)
                    a, b, top, total = (m.as_float(x) for x in got)
                    own = [m.select(there, top, _LOWEST), *(m.select(there, x, 0.0) for x in (a, b, total))]
                    found = self._joined(found, own) if found else own
                highest = found[0]
                for distance in (8, 4, 2, 1):
                    highest = m.larger(highest, m.from_lane_xor(highest, distance))
                weight = m.exp2(found[0] - highest)
                sums = [x * weight for x in found[1:]]
                for distance in (8, 4, 2, 1):
                    sums = [x + m.from_lane_xor(x, distance) for x in sums]
                share_of = m.reciprocal(sums[2])
                bits = m.pair(sums[0] * share_of, sums[1] * share_of)
                writes = m.same(m.lane % 16, 0)
                m.when(writes, lambda: self._send("attended", unit, bits, flag))

            m.when(first < pairs, join)
