"""What the text of a compiled program tells: its collectives, how often they run, and its largest arrays.

The text is XLA's, `jax.stages.Compiled.as_text()`, of the program of one device: shapes are a device's own parts.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # others end in their number of bits, or name it: bf16, f8e4m3fn
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
# Results that are another array's memory, or parts of a result that is listed itself.
_NO_ARRAYS = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "constant"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      type: of the result, an array or a tuple of arrays, with layouts.
      op: such as "fusion" or "all-reduce-start".
      rest: operands and attributes.
    """

    name: str
    type: str
    op: str
    rest: str

    def source(self) -> str:
        """Where it comes from: the end of JAX's name for it, or an argument's path."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1].replace("\\'", "'") if match else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes.

    Attributes:
      kind: "all-reduce" and so on.
      axes: of the mesh, where the text names them.
      times: how often they run in one call of the program.
      bytes: of the arrays that a device has whole after (all-gather), before (reduce-scatter) or both, over all times.
    """

    kind: str
    axes: str
    times: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class LargeArray:
    """Results of one shape and source: `count` instructions, each of `bytes`, padding of the layout included."""

    shape: str
    bytes: int
    count: int
    source: str


class Program:
    """The computations of a program's text."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif " = " in line:
                current.append(_instruction(line))

    def collectives(self) -> list[Collective]:
        """Most bytes first."""
        times: collections.Counter[tuple[str, str]] = collections.Counter()
        size: collections.Counter[tuple[str, str]] = collections.Counter()
        for name, runs in self._runs(self.entry, 1, into_fusions=True):
            types = {x.name: x.type for x in self.computations[name]}
            for x in self.computations[name]:
                kind = x.op.removesuffix("-start")
                if kind in _COLLECTIVES:
                    key = kind, _axes(x.rest)
                    times[key] += runs
                    size[key] += runs * _moved(x, types)
        return [Collective(*key, times[key], size[key]) for key, _ in size.most_common()]

    def largest(self, count: int) -> list[LargeArray]:
        """The largest arrays in a device's memory, arguments included; not all of them live at once."""
        found: collections.Counter[tuple[str, int, str]] = collections.Counter()
        names = {name for name, _ in self._runs(self.entry, 1, into_fusions=False)}
        for name in names:
            for x in self.computations[name]:
                if x.op in _NO_ARRAYS and not (x.op == "parameter" and name == self.entry):
                    continue
                if x.op.endswith(("-start", "-update")):  # its -done has the result alone
                    continue
                source = x.source() or x.op
                for array in _ARRAY.finditer(x.type):
                    if "S(1)" not in (array[4] or ""):  # those lie in on-chip memory
                        found[f"{array[1]}[{array[2]}]", _bytes(array), source] += 1
        order = sorted(found.items(), key=lambda item: (-item[0][1], item[0]))
        return [LargeArray(shape, size, times, source) for (shape, size, source), times in order[:count]]

    def _runs(self, name: str, times: int, *, into_fusions: bool) -> Iterator[tuple[str, int]]:
        """(computation, how often it runs) for `name` and all that it calls; branches count as if all were taken."""
        yield name, times
        for x in self.computations[name]:
            inner = times
            if x.op == "while":
                inner *= self._trips(x.rest)
                called = re.findall(r"body=%?([\w.\-]+)", x.rest)
            elif x.op in ("call", "call-start", "async-start") or (x.op == "fusion" and into_fusions):
                called = re.findall(r"(?:calls|to_apply|called_computation)=%?([\w.\-]+)", x.rest)
            elif x.op == "conditional":
                called = re.findall(r"%?([\w.\-]+)", "".join(re.findall(r"branch_computations=\{([^}]*)\}", x.rest)))
                called += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", x.rest)
            else:
                continue
            for computation in called:
                yield from self._runs(computation, inner, into_fusions=into_fusions)

    def _trips(self, rest: str) -> int:
        """Rounds of a loop that counts from 0 to a constant, as `lax.scan` makes them; 1 for any other."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", rest)
        lines = self.computations[condition[1]] if condition else []
        limits = [int(x.rest.partition(")")[0]) for x in lines if x.op == "constant" and x.type.startswith("s32[]")]
        compares = any(x.op == "compare" and "direction=LT" in x.rest for x in lines)
        return limits[0] if compares and len(limits) == 1 else 1


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = rest.find(" ") if not rest.startswith("(") else _closing(rest) + 1
    op, _, operands = rest[end:].strip().partition("(")
    return Instruction(name.removeprefix("%"), rest[:end], op, operands)


def _closing(text: str) -> int:
    """Where the parenthesis closes that `text` begins with; layouts have parentheses of their own."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _moved(x: Instruction, types: dict[str, str]) -> int:
    """Bytes of the larger side of a collective. A start's result repeats the operands."""
    operands = re.findall(r"%([\w.\-]+)", x.rest.partition("), ")[0])
    before = sum(_all_bytes(types.get(name, "")) for name in operands)
    after = _all_bytes(x.type)
    return max(before, after - before if x.op.endswith("-start") and after > before else after)


def _axes(rest: str) -> str:
    """The mesh axes in `replica_groups=mesh['data'=256] {'data'}`."""
    match = re.search(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}", rest)
    return match[1].replace("'", "") if match else ""


def _all_bytes(type: str) -> int:
    return sum(_bytes(array) for array in _ARRAY.finditer(type))


def _bytes(array: re.Match[str]) -> int:
    """Memory of one array: its layout cuts the minor dimensions into tiles, the last of which may be half empty."""
    dtype, dims, order, layout = array.groups()
    shape = [int(n) for n in dims.split(",") if n]
    tile = re.match(r"T\(([\d,]+)\)", layout or "")
    if tile and order:
        minor = [int(d) for d in order.split(",")]
        for dimension, side in zip(minor, reversed([int(n) for n in tile[1].split(",")]), strict=False):
            shape[dimension] = -(-shape[dimension] // side) * side
    bits = _BITS.get(dtype)
    if bits is None:
        number = re.search(r"\d+", dtype)
        bits = int(number[0]) if number else 0
    return math.prod(shape) * bits // 8
