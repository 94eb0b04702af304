"""Features as whole numbers of three digits, so that the tensor cores multiply them with codes as these are.

Codes of 8 bits would have to become bfloat16 first, at 1.75 instructions each and more than the memory leaves time for.
Features are few, so they change instead: x = (d0 + 256 d1 + 65536 d2) unit, digits from -128 to 127 and the unit a
power of two, of which the largest feature has at least 2^21. So a feature has all its 8 bits unless it is 2^14 times
smaller than the largest, and else it is off by half a unit at most: sums of codes are those of float32. A digit has two
of the eight columns of the right factor that were alike, so it costs no more products. Sums of digits are exact:
128 * 127 * inputs is below 2^31 up to 132,000 inputs.
"""

from typing import Any

from sepjax.model.one_row.block import Block
from sepjax.model.one_row.shape import BLOCK, DIGITS, WARPS, Product

_TOGETHER = 4  # blocks of columns of a warp at a time
_WHOLE = 1.5 * 2**23  # floats from here on are whole, and their lower 23 bits the number itself
_LEAST, _NOT_FINITE = 32, 255  # exponents: of units that are no denormal numbers; of infinity and NaN


class Digits(Block):
    """What the warps that compute make of features."""

    def _larger(self, a: Any, b: Any) -> Any:
        return self.m.select(a < b, b, a)

    def _larger_of_bits(self, top: Any, pair: Any) -> Any:
        """Of bits of floats without their signs: as whole numbers they are in order, and NaN is above all."""
        return self._larger(self._larger(top, (pair << 16) & 0x7FFF0000), pair & 0x7FFF0000)

    def _keep_top(self, top: Any, tops: int) -> None:
        m = self.m
        for distance in (16, 8, 4, 2, 1):
            top = self._larger(top, m.from_lane_xor(top, distance))
        m.when(m.same(m.lane, 0), lambda: m.keep(m.warp * 4 + tops, top))

    def _of_digits(self, tops: int) -> tuple[Any, Any]:
        """1 / unit, and the unit, of the largest feature; of features that are not all finite the unit is infinite."""
        m = self.m
        first, *rest = [x for i in range(WARPS // 4) for x in m.shared_four(m.integer(tops + 16 * i))]
        for x in rest:
            first = self._larger(first, x)
        exponent = self._larger(first >> 23, m.integer(_LEAST))
        of_unit = m.select(m.same(exponent, _NOT_FINITE), exponent, exponent - 21)
        return m.as_float((m.integer(275) - exponent) << 23), m.as_float(of_unit << 23)

    def _make_digits(self, product: Product, features: int, tops: int) -> None:
        """Digits of the columns that the warp multiplies, so it waits for no other."""
        m, rounds = self.m, product.rounds
        of_unit, _ = self._of_digits(tops)
        number = product.parts * rounds

        def some(begin: Any, together: int) -> None:
            places = []
            for i in range(together):
                part, turn = (begin + i) // rounds, (begin + i) % rounds
                column = (turn * WARPS + m.warp) * BLOCK + m.lane * 4
                inside = column < product.columns
                places.append((inside, m.select(inside, part * product.columns + column, 0)))
            words = [[m.shared(at * 2 + (features + 4 * i)) for i in range(2)] for _, at in places]
            for (inside, at), pairs in zip(places, words, strict=True):
                digits = self._digits_of_four(pairs, of_unit)

                def keep(at: Any = at, digits: Any = digits) -> None:
                    for i, x in enumerate(digits):
                        m.keep(at + (self.at["digits"] + i * product.inputs), x)

                m.when(inside, keep)

        whole = number // _TOGETHER * _TOGETHER
        m.loop(0, whole, _TOGETHER, lambda begin: some(begin, _TOGETHER))
        if number % _TOGETHER:
            some(m.integer(whole), number % _TOGETHER)
        m.meet_warp()

    def _digits_of_four(self, pairs: list[Any], of_unit: Any) -> list[Any]:
        """Of four features in a row: their first digits, their second and their third ones."""
        m = self.m
        numbers = []
        for x in (half(pair) for pair in pairs for half in (m.low_half, m.high_half)):
            whole = m.as_bits(m.fma(x, of_unit, m.float(_WHOLE)))
            # 128 to each digit, so that none takes from the next one; 2^22 is in the bits already.
            numbers.append((whole + (0x808080 - (1 << 22))) ^ 0x808080)
        (a, b), (c, d) = (
            [m.bytes_of(*numbers[2 * i : 2 * i + 2], chosen) for chosen in (0x5140, 0x0062)] for i in range(2)
        )
        return [m.bytes_of(a, c, 0x5410), m.bytes_of(a, c, 0x7632), m.bytes_of(b, d, 0x5410)]

    def _number_of_digits(self, found: Any) -> Any:
        """What lanes 4 g to 4 g + 3 have, the sums of a digit each and one of none, as a number in units."""
        m, digit = self.m, self.m.lane % 4
        value = m.select(digit < DIGITS, m.as_float((digit * 8 + 127) << 23), 0.0)
        found = m.as_number(found) * value
        for distance in (1, 2):
            found = found + m.from_lane_xor(found, distance)
        return found
