"""What the kernel is made for, who computes what, and where everything lies."""

import dataclasses
import functools

PACKET = 8  # bytes: 32 bits and a flag
WARPS = 8  # of a block that compute; one more copies
THREADS = 32 * WARPS
TILE = 64  # slots of a cache that are copied at a time
SPLITS = 64  # blocks that share a key head's slots, at most: half a warp joins what they found
STAGE = 32 * 1024  # bytes of a place in the ring, at most
SHARED = 226 * 1024  # bytes of shared memory that a block may have
WEIGHTS = 9 * 32  # bytes of a warp's weights: of 8 slots for 8 queries, and what sums shrink by
ROWS, COLUMNS = 8, 64  # of a matrix, that a warp multiplies at a time, at least
BLOCK = 128  # bytes of a row that it reads at a time
_LEAST_STAGES = 3
_MOST_QUERIES = 8  # of a key head
_MOST_UNITS = 4 * THREADS
DIGITS = 3  # of a feature that meets codes


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix of U units, each of some rows, and how blocks and warps share it.

    A chunk is what one place of the ring has: `units` whole ones, or one of `parts` of a unit's columns.
    """

    U: int
    rows: int  # of a unit
    inputs: int
    units: int
    parts: int
    first: int  # the block that has the first chunk
    blocks: int
    width: int = 2  # bytes of a number

    @property
    def chunks(self) -> int:
        """Of units, whatever their parts are."""
        return -(-self.U // self.units)

    @property
    def most(self) -> int:
        """Units of a block, at most."""
        return -(-self.chunks // self.blocks) * self.units

    @property
    def columns(self) -> int:
        """Of a part."""
        return self.inputs // self.parts

    @property
    def rounds(self) -> int:
        """Blocks of a warp's columns."""
        return -(-self.columns * self.width // (BLOCK * WARPS))

    @property
    def of_chunk(self) -> int:
        """Rows of a chunk."""
        return self.units * self.rows

    @property
    def bytes(self) -> int:
        """Of a chunk."""
        return self.units * self.rows * self.columns * self.width


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a model and a cache of one row."""

    L: int
    D: int
    N: int
    K: int
    H: int
    F: int
    C: int  # slots
    ends: tuple[int, ...]  # where the zones but the last end
    epsilon: float
    blocks: int
    stacked: bool = False  # whether the caches of all layers are one array, which stays as it is
    codes: bool = False  # whether matrices have 8 bits, and scales
    biased: bool = False  # whether queries, keys and values have biases
    head_norms: bool = False  # whether each head's query and key have an RMS norm

    @property
    def entries(self) -> tuple[str, ...]:
        """What a layer has an address of: its arrays as given, then its cache and where new entries are written."""
        scales = ("qkv scales", "out scales", "into scales", "down scales") if self.codes else ()
        others = [*(["qkv bias"] if self.biased else []), *(["query norm", "key norm"] if self.head_norms else [])]
        return "qkv", "out", "into", "down", "norm", "mlp norm", *scales, *others, "k", "v", "new k", "new v"

    @property
    def G(self) -> int:
        """Query heads of a key head."""
        return self.N // self.K

    @property
    def zones(self) -> int:
        """Z."""
        return len(self.ends) + 1

    @property
    def splits(self) -> int:
        """Blocks that share the slots of a key head."""
        return max(1, min(SPLITS, self.C // TILE, self.blocks // self.K))

    @functools.cached_property
    def products(self) -> dict[str, Product]:
        """By name; "out" and "down" have their units in the same blocks, which keep the residual stream."""
        N, K, H, D, F, width = self.N, self.K, self.H, self.D, self.F, 1 if self.codes else 2
        found, first = {}, 0
        sizes = {"qkv": ((N + 2 * K) * H // 2, 2, D), "out": (D // 2, 2, N * H), "into": (F // 2, 4, D)}
        sizes["down"] = D // 2, 2, F
        for name, (U, rows, inputs) in sizes.items():
            longest = max(inputs, N * H, F) if name in ("out", "down") else inputs
            units = _units(U, rows, longest * width, self.blocks)
            start = found["out"].first if name == "down" else first
            parts = _parts(units * rows * width, inputs)
            found[name] = Product(U, rows, inputs, units, parts, start % self.blocks, self.blocks, width)
            first += found[name].chunks
        return found

    @property
    def packets(self) -> dict[str, int]:
        """Packets of each vector that blocks hand to each other: pairs of bfloat16, of "shares" floats."""
        N, K, H, D, F = self.N, self.K, self.H, self.D, self.F
        shares = N * self.splits * (H + 2)
        return {
            "x": D // 2, "qkv": (N + 2 * K) * H // 2, "shares": shares, "attended": N * H // 2, "y": D // 2,
            "hidden": F // 2,
        }  # fmt: skip

    @functools.cached_property
    def packets_at(self) -> dict[str, int]:
        """Where they begin, in bytes, and "end"."""
        return _one_after_another(self.packets, PACKET, 128)

    @functools.cached_property
    def shared_at(self) -> dict[str, int]:
        """Where everything lies in shared memory but the ring, which begins at "end"."""
        sums = max(-(-x.most // x.units) * x.of_chunk for x in self.products.values()) * 4 * WARPS
        of_warps, longest = WARPS * self.G * (self.H + 2) * 4, max(self.D, self.N * self.H, self.F)
        # Two, in turns: while some warps still read one, others write the other.
        vectors = {"features": max(2 * self.D, of_warps), "others": 2 * max(self.N * self.H, self.F)}
        if self.codes:  # one: all have read it before products begin, which read digits, a warp its own
            vectors = {"features": 2 * longest, "digits": max(DIGITS * longest, of_warps), "tops": 2 * 4 * WARPS}
        sizes = {
            "ready": 8 * 16, "free": 8 * 16, "addresses": 8 * len(self.entries) * self.L, "squares": 2 * 4 * WARPS,
            "residual": self.products["out"].most * 8, "sums": sums, **vectors,
            "turns": 4 * self.zones * self.H, "queries": 16 * self.zones * self.H, "own": 4 * self.H,
            "own_scores": 4 * _MOST_QUERIES, "weights": WARPS * WEIGHTS,
        }  # fmt: skip
        at = _one_after_another(sizes, 1, 128)
        if self.codes:
            at["others"] = at["features"]
        return at | {"of_warps": at["digits" if self.codes else "features"]}

    @property
    def stage(self) -> int:
        """Bytes of a place in the ring."""
        largest = max(max(x.bytes for x in self.products.values()), 4 * TILE * self.H)
        return -(-largest // 128) * 128

    @property
    def stages(self) -> int:
        """Places in the ring."""
        return min(16, (SHARED - self.shared_at["end"]) // self.stage)

    def fault(self) -> str | None:
        """Why the kernel cannot be made, or None."""
        if self.H not in (64, 128):
            return f"it serves heads of 64 and 128, got {self.H}"
        if self.C % TILE or not self.C:
            return f"it reads {TILE} slots at a time, the cache has {self.C}"
        if any(x.columns % COLUMNS for x in self.products.values()):
            return f"it reads {COLUMNS} numbers of a row at a time, the model is {self.D} wide, its MLP {self.F}"
        if self.blocks < self.K:
            return f"it gives a block to each of {self.K} key heads, the GPU has {self.blocks} SMs"
        if self.G > _MOST_QUERIES:
            return f"it serves {_MOST_QUERIES} query heads a key head, got {self.G}"
        if self.stages < _LEAST_STAGES:
            return f"its {self.shared_at['end']} bytes of shared memory leave no room for copies ahead"
        if max(x.most for x in self.products.values()) > _MOST_UNITS:
            return f"its blocks would have more than {_MOST_UNITS} rows each"
        return None


def _units(U: int, rows: int, row: int, blocks: int) -> int:
    """Units of a chunk: no more than for as many chunks as blocks; of large matrices 8 rows or parts of them."""
    fit = max(STAGE // (rows * row), ROWS // rows)
    divisors = [n for n in range(1, min(fit, WARPS) + 1) if U % n == 0]
    enough = [n for n in divisors if U // n <= blocks]
    return min(enough) if enough else max(divisors)


def _parts(height: int, inputs: int) -> int:
    """Of columns of so many bytes."""
    parts = 1
    while parts < inputs and (height * inputs > STAGE * parts or inputs % (parts * COLUMNS)):
        parts += 1
    return parts


def _one_after_another(sizes: dict[str, int], width: int, alignment: int) -> dict[str, int]:
    found, at = {}, 0
    for name, size in sizes.items():
        found[name] = at
        at += -(-size * width // alignment) * alignment
    return found | {"end": at}
