"""Attention of the token: a block has a share of the slots of a key head, and half a warp joins shares."""

import math
from typing import Any

from sepjax.model.one_row.block import Block
from sepjax.model.one_row.shape import THREADS, TILE, WARPS, WEIGHTS

_LOG2E = math.log2(math.e)
_LOWEST = -1e30  # below every score, and finite


class Attention(Block):
    """The attention of the warps that compute."""

    slot: Any  # of the token

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
            there = i < total
            # Where there are norms of heads, threads of a warp add up: all of one that has a vector come.
            here, i = (m.warp * 32 + begin < total, m.select(there, i, 0)) if s.head_norms else (there, i)
            m.when(
                here, lambda i=i, there=there: self._turn(layer, head, share, flag, i // quarter, i % quarter, there)
            )
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
        return self.shape.H**-0.5 * _LOG2E

    def _turn(self, layer: Any, head: Any, share: Any, flag: Any, which: Any, j: Any, there: Any) -> None:
        """Packets j and H / 4 + j of a vector: of a query, the key behind them or the value behind that; written where
        the thread is `there`.
        """
        m, s, quarter, half = self.m, self.shape, self.shape.H // 4, self.shape.H // 2
        of_new = head + (s.N - s.K) + (which - (s.G - 1)) * s.K  # keys stand after all queries, then values
        packet = m.select(which < s.G, head * s.G + which, of_new) * half + j
        weights = self._head_weights(layer, which, j) if s.head_norms else []
        pairs = m.receive([self._packet("qkv", packet + x) for x in (0, quarter)], flag)
        (a, b), (c, d) = ((m.low_half(x), m.high_half(x)) for x in pairs)
        if weights:
            factor = self._head_factor(a * a + b * b + (c * c + d * d))
            a, b, c, d = (x * factor * y for x, y in zip((a, b, c, d), weights, strict=True))

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

        def new(words: Any, number: int, entry: str) -> None:
            keep(m.integer(self.at["own"] + number * s.H * 2), words)
            place = head * self.new_strides[0] + self.slot * self.new_strides[1]
            address = self._entry(layer, entry) + m.wide(place * 2)
            for i, word in enumerate(words):
                to = address + m.wide((j + i * quarter) * 4)
                m.when(m.same(share, 0), lambda to=to, word=word: m.store(to, word))

        m.when(m.both(there, which < s.G), query)
        m.when(m.both(there, m.same(which, s.G)), lambda: new(turned(s.zones - 1), 0, "new k"))
        m.when(m.both(there, m.same(which, s.G + 1)), lambda: new(pairs, 1, "new v"))

    def _head_weights(self, layer: Any, which: Any, j: Any) -> list[Any]:
        """Of the norm of a head's query or key: those of the four numbers of two packets."""
        m, s = self.m, self.shape
        begin = m.select(which < s.G, self._entry(layer, "query norm"), self._entry(layer, "key norm"))
        return [m.as_float(m.load(begin + m.wide((j * 2 + x) * 4))) for x in (0, 1, s.H // 2, s.H // 2 + 1)]

    def _head_factor(self, squares: Any) -> Any:
        """What a head's norm multiplies by, of the squares of all threads that have its vector."""
        m, distance = self.m, self.shape.H // 8
        while distance:
            squares, distance = squares + m.from_lane_xor(squares, distance), distance // 2
        return m.rsqrt(squares * (1.0 / self.shape.H) + self.shape.epsilon)

    def _tile(self, number: Any, count: Any, state: list[Any]) -> list[Any]:
        """The state after the slots of a tile, 8 a warp: of lane 4 g + t query g's maximum and part of the sum of its
        weights, and of all queries sums of the lane's numbers of values.
        """
        m = self.m
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
        each, width, first = s.H // 32, s.H + 2, self.at["of_warps"]
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
        width, first = s.H + 2, self.at["of_warps"]
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

    def _begin_turns(self) -> None:
        """Cosines and sines of all zones, into shared memory."""
        m, size = self.m, self.shape.zones * self.shape.H // 2
        for begin in range(0, 2 * size, THREADS):
            i = m.thread + begin

            def take(i: Any = i) -> None:
                table = m.select(i < size, m.address(self.given.cos), m.address(self.given.sin))
                m.keep(i * 4 + self.at["turns"], m.load(table + m.wide(i % size * 4)))

            m.when(i < 2 * size, take)
