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

from sepjax.model.one_row.shape import ENTRIES, PACKET, THREADS, TILE, WARPS, Product, Shape

QKV, OUT, INTO, DOWN, NORM, MLP_NORM, K_CACHE, V_CACHE, K_NEW, V_NEW = range(ENTRIES)
LOG2E = math.log2(math.e)
_FEATURES = {"x": "features", "attended": "others", "y": "features", "hidden": "others"}  # where vectors are kept
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
                    for r in range(2):
                        source = begin + m.wide(r * row + part * product.columns * 2)
                        m.copy(to + (2 * half + r) * product.columns * 2, source, product.columns * 2, barrier)
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

    def _packet(self, name: str, i: Any, copy: Any = None) -> Any:
        if copy is None:
            copy = self.m.block % self.shape.copies[name]
        number = i + copy * self.shape.packets[name]
        return self.m.address(self.given.packets) + self.m.wide(number * PACKET + self.shape.packets_at[name])

    def _send(self, name: str, i: Any, bits: Any, flag: Any) -> None:
        for copy in range(self.shape.copies[name]):
            self.m.send(self._packet(name, i, copy), bits, flag)

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
        total = self._added([self.m.shared_float(squares + 4 * w) for w in range(WARPS)])
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

        def normed(unit: Any, local: Any, sums: list[Any]) -> None:
            factor = None if squares is None else self._root(squares)
            finish(unit, local, sums if factor is None else [x * factor for x in sums])

        def chunk(i: Any, count: Any) -> list[Any]:
            return [self._chunk(product, i, count, self.at[_FEATURES[source]], normed)]

        (count,) = m.loop(0, chunks, 1, chunk, count)
        if product.splits > 1:
            m.when(chunks >= 1, lambda: m.meet(1, THREADS))
            sums = lambda local: [self._sum(product, local, r) for r in range(product.rows)]  # noqa: E731
            self._each_unit(name, lambda unit, local: normed(unit, local, sums(local)))
        return count

    def _added(self, numbers: list[Any]) -> Any:
        while len(numbers) > 1:
            rest = numbers[len(numbers) // 2 * 2 :]
            numbers = [a + b for a, b in zip(numbers[::2], numbers[1::2], strict=False)] + rest
        return numbers[0]

    def _sum(self, product: Product, local: Any, row: int) -> Any:
        n = product.splits
        at = (local * product.rows + row) * (4 * n) + self.at["sums"]
        return self._added([self.m.shared_float(at + 4 * i) for i in range(n)])

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
        at = [m.select(there, x, size - 1) for x, there in zip(places, inside, strict=True)]
        factors: list[Any] = [None] * number
        if weights is not None:
            factors = [[m.as_float(m.load(weights + m.wide(x * 8 + 4 * i))) for i in range(2)] for x in at]
        found = m.receive([self._packet(source, x) for x in at], flag)
        for pair, x, there, factor in zip(found, at, inside, factors, strict=True):
            if factor is not None:
                low, high = m.low_half(pair), m.high_half(pair)
                total = total + m.select(there, low * low + high * high, 0.0)
                pair = m.pair(low * factor[0], high * factor[1])
            m.keep(x * 4 + self.at[_FEATURES[source]], pair)  # of the last place from several threads, the same bits
        return total

    def _chunk(self, product: Product, i: Any, count: Any, first: int, finish: Callable[..., None]) -> Any:
        """A chunk's units, into "sums"; or finished, where a warp has a unit to itself."""
        m, splits = self.m, product.splits
        unit, split = m.warp // splits, m.warp % splits
        works = unit < product.units if product.units * splits < WARPS else None
        vectors, row = product.columns // 8 // splits, product.columns * 2
        sums = [m.float(0.0) for _ in range(2 * product.rows)]
        for part in range(product.parts):
            place, barrier, turn = self._place(count)
            m.wait(barrier + self.at["ready"], turn % 2)
            of_unit = place + m.select(works, unit, 0) * (2 * row) if works is not None else place + unit * (2 * row)
            for begin in range(0, vectors, 32):
                vector, there = m.lane + begin, None
                if begin + 32 > vectors:
                    there = vector < vectors
                    vector = m.select(there, vector, vectors - 1)
                at = (split * vectors + vector) * 16
                features = m.shared_four(at + (first + part * row))
                if there is not None:
                    features = [m.select(there, x, 0) for x in features]
                halves = [[of_unit + (h * product.units * 2 + r) * row for r in range(2)] for h in range(product.rows // 2)]
                rows = [m.shared_four(x + at) for half in halves for x in half]
                for x, *ws in zip(features, *rows, strict=True):
                    low, high = m.low_half(x), m.high_half(x)
                    for r, w in enumerate(ws):
                        sums[2 * r] = m.fma(m.low_half(w), low, sums[2 * r])
                        sums[2 * r + 1] = m.fma(m.high_half(w), high, sums[2 * r + 1])
            m.arrive_warp(barrier + self.at["free"])
            count = count + 1
        found = self._over_lanes([a + b for a, b in zip(sums[::2], sums[1::2], strict=True)])
        of_row = 32 // product.rows
        if splits == 1:
            self._finish(product, i, unit, works, found, finish)
            return count
        writes = m.same(m.lane % of_row, 0)
        writes = writes if works is None else m.both(writes, works)
        local = (i * product.units + unit) * product.rows + m.lane // of_row
        m.when(writes, lambda: m.keep((local * splits + split) * 4 + self.at["sums"], found))
        return count

    def _finish(
        self, product: Product, i: Any, unit: Any, works: Any, found: Any, finish: Callable[..., None]
    ) -> None:  # fmt: skip
        """By the first lane, of what `_over_lanes` has left in several."""
        m, of_row = self.m, 32 // product.rows
        sums = [found, *(m.from_lane_xor(found, row * of_row) for row in range(1, product.rows))]
        first, _ = self._chunks_of(product)
        number = (first + i * product.blocks) * product.units + unit
        there = m.both(m.same(m.lane, 0), number < product.U)
        there = there if works is None else m.both(there, works)
        m.when(there, lambda: finish(number, i * product.units + unit, sums))

    def _over_lanes(self, sums: list[Any]) -> Any:
        """Sums over the lanes, of each of some numbers: lane 0 has the first's, then in equal distances the others'."""
        m, distance = self.m, 16
        while len(sums) > 1:
            half, upper = len(sums) // 2, m.same(m.lane & distance, distance)
            given = [m.select(upper, a, b) for a, b in zip(sums[:half], sums[half:], strict=True)]
            kept = [m.select(upper, b, a) for a, b in zip(sums[:half], sums[half:], strict=True)]
            sums = [x + m.from_lane_xor(y, distance) for x, y in zip(kept, given, strict=True)]
            distance //= 2
        found = sums[0]
        while distance:
            found = found + m.from_lane_xor(found, distance)
            distance //= 2
        return found

    # -- attention ----------------------------------------------------------------------------------------------------

    def _attend(self, layer: Any, count: Any, flag: Any) -> Any:
        """A share of a key head's slots, its sums sent as "shares". Returns the ring's count."""
        m, s = self.m, self.shape
        head, share, tiles = self._tiles()
        takes_part = m.block < s.K * s.splits
        m.when(takes_part, lambda: self._queries(layer, head, share, flag))
        lanes = s.H // 8  # of a slot
        own = self._own_state(share, lanes)

        def tile(i: Any, count: Any, *state: Any) -> list[Any]:
            return [count + 1, *self._tile(share + i * s.splits, count, list(state))]

        count, *state = m.loop(0, tiles, 1, tile, count, *own)
        m.when(takes_part, lambda: self._send_shares(state, head, share, flag))
        return count

    def _queries(self, layer: Any, head: Any, share: Any, flag: Any) -> None:
        """The head's queries turned to fit each zone, its own key and value, as floats; its new entries are written."""
        m, s = self.m, self.shape
        pairs, half = s.H // 2, s.H // 2
        total = (s.G + 2) * pairs
        for begin in range(0, total, THREADS):
            i = m.thread + begin
            there = i < total
            which = m.select(there, i // pairs, 0)
            of_query = head * s.G + which
            of_new = head + (s.N - s.K) + (which - (s.G - 1)) * s.K  # the key's head after all queries, then the value's
            packet = m.select(which < s.G, of_query, of_new) * pairs + i % pairs
            def take(i: Any = i, packet: Any = packet) -> None:
                (pair,) = m.receive([self._packet("qkv", packet)], flag)
                m.keep(i * 4 + self.at["projected"], pair)
            m.when(there, take)
        m.meet(1, THREADS)

        def projected(which: Any, i: Any) -> Any:
            """Number i of a vector, as a float."""
            pair = m.shared((which * pairs + i // 2) * 4 + self.at["projected"])
            return m.select(m.same(i % 2, 0), m.low_half(pair), m.high_half(pair))

        def turned(which: Any, zone: Any, i: Any) -> list[Any]:
            at, of_sines = (zone * half + i) * 4 + self.at["turns"], 4 * s.zones * half
            cos, sin = m.shared_float(at), m.shared_float(at + of_sines)
            first, second = projected(which, i), projected(which, i + half)
            return [first * cos - second * sin, second * cos + first * sin]

        scale = s.H**-0.5 * LOG2E
        number = s.zones * s.G * half
        for begin in range(0, number, THREADS):
            i = m.thread + begin
            def turn(i: Any = i) -> None:
                which = i // half
                for j, x in enumerate(turned(which % s.G, which // s.G, i % half)):
                    m.keep((which * s.H + i % half + j * half) * 4 + self.at["queries"], x * scale)
            m.when(i < number, turn)

        def own() -> None:
            zones, i = s.zones * s.G * s.H * 4 + self.at["queries"], m.thread
            key = turned(m.integer(s.G), m.integer(s.zones - 1), i)
            value = [projected(m.integer(s.G + 1), i + j * half) for j in range(2)]
            place = head * self.new_strides[0] + self.slot * self.new_strides[1]
            for x, which, entry in ((key, 0, K_NEW), (value, 1, V_NEW)):
                address = self._entry(layer, entry)
                for j in range(2):
                    bits = m.pair(x[j], x[j])
                    m.keep((i + j * half) * 4 + (zones + which * s.H * 4), m.low_half(bits))
                    writes = address + m.wide((place + i + j * half) * 2)
                    m.when(m.same(share, 0), lambda writes=writes, bits=bits: m.store_half(writes, bits))

        m.when(m.thread < half, own)
        m.meet(1, THREADS)

    def _eight(self, at: Any) -> list[Any]:
        """Eight floats of shared memory."""
        return [self.m.as_float(x) for i in range(2) for x in self.m.shared_four(at + 16 * i)]

    def _dots(self, zone: Any, key: list[Any], lanes: int) -> list[Any]:
        """Scores of eight numbers of a key a lane with the queries of a zone, summed over so many lanes."""
        m, s, found = self.m, self.shape, []
        first = (m.lane % lanes) * 32 + self.at["queries"]
        for g in range(s.G):
            query = self._eight(zone * (s.G * s.H * 4) + (first + g * s.H * 4))
            dot = m.float(0.0)
            for a, b in zip(query, key, strict=True):
                dot = m.fma(a, b, dot)
            found.append(dot)
        distance = 1
        while distance < lanes:
            found = [x + m.from_lane_xor(x, distance) for x in found]
            distance *= 2
        return found

    def _own_state(self, share: Any, lanes: int) -> list[Any]:
        """Maximum, sum of weights and eight sums of values for each query: of the token itself, in one place."""
        m, s = self.m, self.shape
        at = (m.lane % lanes) * 32 + (self.at["queries"] + s.zones * s.G * s.H * 4)
        scores, value = self._dots(m.integer(s.zones - 1), self._eight(at), lanes), self._eight(at + s.H * 4)
        is_own = m.both(m.same(share, 0), m.thread < lanes)
        state = []
        for score in scores:
            state += [m.select(is_own, score, _LOWEST), m.select(is_own, m.float(1.0), 0.0)]
            state += [m.select(is_own, x, 0.0) for x in value]
        return state

    def _tile(self, number: Any, count: Any, state: list[Any]) -> list[Any]:
        """The state after the slots of a tile."""
        m, s = self.m, self.shape
        lanes, size = s.H // 8, TILE * s.H * 2
        together, slots = 32 // lanes, TILE // WARPS
        rows = [m.warp * slots + begin + m.lane // lanes for begin in range(0, slots, together)]
        biases = [m.as_float(m.load(m.address(self.given.bias) + m.wide((number * TILE + x) * 4))) for x in rows]
        place, barrier, turn = self._place(count)
        m.wait(barrier + self.at["ready"], turn % 2)
        for row, bias in zip(rows, biases, strict=True):
            at = place + row * (s.H * 2) + (m.lane % lanes) * 16
            key, value = (self._halves(m.shared_four(at + x)) for x in (0, size))
            slot, zone = number * TILE + row, m.integer(0)
            for end in s.ends:
                zone = zone + m.select(slot < end, m.integer(0), 1)
            scores = [x + bias for x in self._dots(zone, key, lanes)]
            state = [x for g, score in enumerate(scores) for x in self._seen(state[10 * g : 10 * g + 10], score, value)]
        m.arrive_warp(barrier + self.at["free"])
        return state

    def _halves(self, words: list[Any]) -> list[Any]:
        return [x for word in words for x in (self.m.low_half(word), self.m.high_half(word))]

    def _seen(self, state: list[Any], score: Any, value: list[Any]) -> list[Any]:
        m, (top, total, *sums) = self.m, state
        new = m.larger(top, score)
        shrink, weight = m.exp2(top - new), m.exp2(score - new)
        return [new, m.fma(total, shrink, weight), *(m.fma(weight, v, x * shrink) for x, v in zip(sums, value, strict=True))]

    def _send_shares(self, state: list[Any], head: Any, share: Any, flag: Any) -> None:
        """Joins what the lanes and warps of a block have seen, and sends it: H sums, maximum and total of a query."""
        m, s = self.m, self.shape
        lanes, width = s.H // 8, s.H + 2
        queries = [state[10 * g : 10 * g + 10] for g in range(s.G)]
        distance = lanes
        while distance < 32:
            queries = [self._joined(x, [m.from_lane_xor(y, distance) for y in x]) for x in queries]
            distance *= 2
        first = self.at["features"]

        def keep() -> None:
            for g, (top, total, *sums) in enumerate(queries):
                at = (m.warp * s.G + g) * (4 * width) + first
                for i, x in enumerate(sums):
                    m.keep(at + m.lane * 32 + 4 * i, x)
                for i, x in enumerate((top, total)):
                    m.when(m.same(m.lane, 0), lambda at=at, i=i, x=x: m.keep(at + (s.H + i) * 4, x))

        m.when(m.lane < lanes, keep)
        m.meet(1, THREADS)
        number = s.G * width
        for begin in range(0, number, THREADS):
            i = m.thread + begin

            def send(i: Any = i) -> None:
                query, x = i // width, i % width
                places = [(query + w * s.G) * (4 * width) + first for w in range(WARPS)]
                tops = [m.shared_float(at + s.H * 4) for at in places]
                top = tops[0]
                for other in tops[1:]:
                    top = m.larger(top, other)
                # The place after the sums has the maximum itself.
                found = self._added(
                    [m.shared_float(at + x * 4) * m.exp2(other - top) for at, other in zip(places, tops, strict=True)]
                )
                found = m.select(m.same(x, s.H), top, found)
                packet = ((head * s.splits + share) * s.G + query) * width + x
                self._send("shares", packet, m.as_bits(found), flag)

            m.when(i < number, send)

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
