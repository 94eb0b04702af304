"""A GPU's warps in NumPy, for kernels written against `sepjax.model.one_row.warps`: a number is the 32 of a warp.

Every warp is a thread of Python's, so blocks run at the same time and wait for each other as on the device.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

WARP, _SHIFT = 32, 40


class Stuck(Exception):
    """Nobody went on for too long."""


class Block:
    """What the warps of a block share."""

    def __init__(self, size: int, deadline: float):
        self.memory = np.zeros(size, np.uint8)
        self.barriers: dict[int, list[int]] = {}  # offset: arrivals wanted, arrived, bytes that are expected, phase
        self.meetings: dict[int, list[int]] = {}
        self.lock, self.deadline = threading.RLock(), deadline
        self.failed = threading.Event()


class SimulatedWarps:
    """`Warps` of one warp; `arrays`: the bytes of what the kernel is given."""

    def __init__(self, arrays: Sequence[np.ndarray], shared: Block, block: int, warp: int):
        self.arrays, self.shared_block = arrays, shared
        self.lane = np.arange(WARP, dtype=np.int64)
        self.warp, self.block = np.full(WARP, warp), np.full(WARP, block)
        self.thread = self.lane + warp * WARP
        self.mask = np.ones(WARP, bool)

    def integer(self, x: int) -> np.ndarray:
        return np.full(WARP, x, np.int64)

    def float(self, x: float) -> np.ndarray:
        return np.full(WARP, x, np.float32)

    def wide(self, x: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(x, np.int64), WARP)

    def as_bits(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).view(np.uint32).astype(np.int64)

    def as_float(self, x: np.ndarray) -> np.ndarray:
        return (x & 0xFFFFFFFF).astype(np.uint32).view(np.float32)

    def same(self, a: np.ndarray, b: Any) -> np.ndarray:
        return a == b

    def select(self, condition: np.ndarray, a: Any, b: Any) -> np.ndarray:
        dtype = (a if isinstance(a, np.ndarray) else b).dtype
        return np.where(condition, np.asarray(a, dtype), np.asarray(b, dtype))

    def both(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a & b

    def fma(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def larger(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.fmax(a, b)

    def exp2(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.exp2(x.astype(np.float64)).astype(np.float32)

    def rsqrt(self, x: np.ndarray) -> np.ndarray:
        return (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)

    def reciprocal(self, x: np.ndarray) -> np.ndarray:
        return np.float32(1) / x

    def low_half(self, pair: np.ndarray) -> np.ndarray:
        return self.as_float(pair << 16)

    def high_half(self, pair: np.ndarray) -> np.ndarray:
        return self.as_float(pair & 0xFFFF0000)

    def pair(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        a, b = (x.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.int64) for x in (low, high))
        return a | (b << 16)

    def from_lane_xor(self, x: np.ndarray, distance: int) -> np.ndarray:
        return np.asarray(x)[np.arange(WARP) ^ distance]

    def products(self, a: Sequence[Any], b: Sequence[Any], c: Sequence[Any]) -> list[np.ndarray]:
        assert self.mask.all(), "whole warps"
        with np.errstate(all="ignore"):
            # Of which register, half, group of four lanes and lane of it each number is.
            left = _halves(a).reshape(2, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2).reshape(16, 16)
            right = _halves(b).reshape(2, 2, 8, 4).transpose(0, 3, 1, 2).reshape(16, 8)
            products = (left @ right).reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, WARP)
            return list((np.array(c, np.float64) + products).astype(np.float32))

    def code_products(self, a: Sequence[Any], b: Sequence[Any], c: Sequence[Any]) -> list[np.ndarray]:
        assert self.mask.all(), "whole warps"
        g, t = self.lane // 4, self.lane % 4
        left, right, sums = (np.zeros(x, np.int64) for x in ((16, 32), (32, 8), (16, 8)))
        for i, x in enumerate(a):
            left[(g + 8 * (i % 2))[:, None], (4 * t + 16 * (i // 2))[:, None] + np.arange(4)] = self._codes(x)
        for i, x in enumerate(b):
            right[(4 * t + 16 * i)[:, None] + np.arange(4), g[:, None]] = self._codes(x)
        for i, x in enumerate(c):
            sums[g + 8 * (i // 2), 2 * t + i % 2] = x
        sums += left @ right
        assert (abs(sums) < 2**31).all()
        return [sums[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)]

    def _codes(self, x: Any) -> np.ndarray:
        return (np.broadcast_to(x, WARP) & 0xFFFFFFFF).astype(np.uint32)[:, None].view(np.int8)

    def bytes_of(self, a: np.ndarray, b: np.ndarray, chosen: int) -> np.ndarray:
        both = (a & 0xFFFFFFFF) | ((b & 0xFFFFFFFF) << 32)
        return sum(((both >> (8 * (chosen >> (4 * i) & 7))) & 0xFF) << (8 * i) for i in range(4))

    def as_number(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    # -- what is done

    def when(self, condition: Any, body: Callable[[], None]) -> None:
        before = self.mask
        self.mask = before & condition
        if self.mask.any():
            body()
        self.mask = before

    def _uniform(self, x: Any) -> int:
        x = np.broadcast_to(np.asarray(x), WARP)[self.mask]
        assert (x == x[0]).all(), "the same for all threads of a warp"
        return int(x[0])

    def loop(self, begin: Any, end: Any, step: int, body: Callable[..., Any], *carried: Any) -> list[Any]:
        for i in range(self._uniform(begin), self._uniform(end), step):
            self._goes_on()
            carried = tuple(body(self.integer(i), *carried) or ())
        return list(carried)

    def _goes_on(self) -> None:
        if self.shared_block.failed.is_set() or time.monotonic() > self.shared_block.deadline:
            raise Stuck

    def _until(self, is_so: Callable[[], bool]) -> None:
        wait = 1e-4
        while not is_so():
            self._goes_on()
            time.sleep(wait)
            wait = min(2 * wait, 2e-3)  # two dozen that ask all the time take half of it

    # -- global memory

    def address(self, i: int) -> np.ndarray:
        return self.wide((i + 1) << _SHIFT)

    def _found(self, at: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        at = at[self.mask]
        number = int(at[0] >> _SHIFT)
        assert (at >> _SHIFT == number).all()
        places, size = at & ((1 << _SHIFT) - 1), np.dtype(dtype).itemsize
        assert (places % size == 0).all(), "aligned"
        array = self.arrays[number - 1].view(dtype)
        assert (places // size < len(array)).all(), (number - 1, places, len(array))
        return array, places // size

    def _spread(self, x: np.ndarray) -> np.ndarray:
        found = np.zeros(WARP, np.int64)
        found[self.mask] = x
        return found

    def load(self, at: np.ndarray) -> np.ndarray:
        found, before = np.zeros(WARP, np.int64), self.mask
        for number in np.unique(at[before] >> _SHIFT):  # lanes may read different arrays
            self.mask = before & (at >> _SHIFT == number)
            array, places = self._found(at, np.uint32)
            found += self._spread(array[places].astype(np.int64))
        self.mask = before
        return found

    def store(self, at: np.ndarray, x: np.ndarray) -> None:
        array, places = self._found(at, np.uint32)
        array[places] = (x[self.mask] & 0xFFFFFFFF).astype(np.uint32)

    def store_half(self, at: np.ndarray, x: np.ndarray) -> None:
        array, places = self._found(at, np.uint16)
        array[places] = (x[self.mask] & 0xFFFF).astype(np.uint16)

    def send(self, at: np.ndarray, x: np.ndarray, flag: np.ndarray) -> None:
        array, places = self._found(at, np.uint64)
        flags = np.broadcast_to(flag, WARP)[self.mask].astype(np.uint64)
        array[places] = (x[self.mask] & 0xFFFFFFFF).astype(np.uint64) | (flags << np.uint64(32))

    def receive(self, places: Sequence[np.ndarray], flag: np.ndarray) -> list[np.ndarray]:
        found = []
        for at in places:
            array, numbers = self._found(at, np.uint64)
            flags = np.broadcast_to(flag, WARP)[self.mask].astype(np.uint64)
            taken = [np.zeros(0, np.uint64)]

            def is_there(array: Any = array, numbers: Any = numbers, flags: Any = flags, taken: Any = taken) -> bool:
                taken[0] = array[numbers].copy()
                return bool((taken[0] >> np.uint64(32) == flags).all())

            self._until(is_there)
            found.append(self._spread((taken[0] & np.uint64(0xFFFFFFFF)).astype(np.int64)))
        return found

    # -- shared memory

    def _shared_at(self, at: Any, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        at = np.broadcast_to(np.asarray(at, np.int64), WARP)[self.mask]
        size = np.dtype(dtype).itemsize
        assert (at % size == 0).all(), "aligned"
        return self.shared_block.memory.view(dtype), at // size

    def shared(self, at: Any) -> np.ndarray:
        memory, places = self._shared_at(at, np.uint32)
        return self._spread(memory[places].astype(np.int64))

    def shared_float(self, at: Any) -> np.ndarray:
        return self.as_float(self.shared(at))

    def shared_four(self, at: Any) -> list[np.ndarray]:
        assert (np.broadcast_to(np.asarray(at), WARP)[self.mask] % 16 == 0).all(), "aligned"
        return [self.shared(at + 4 * i) for i in range(4)]

    def shared_wide(self, at: Any) -> np.ndarray:
        memory, places = self._shared_at(at, np.uint64)
        return self._spread(memory[places].astype(np.int64))

    def keep(self, at: Any, x: np.ndarray) -> None:
        if x.dtype == np.float32:
            x = self.as_bits(x)
        is_wide = bool((x[self.mask] >> 32 != 0).any())
        memory, places = self._shared_at(at, np.uint64 if is_wide else np.uint32)
        memory[places] = x[self.mask].astype(memory.dtype)

    # -- who waits for whom

    def meet(self, number: int, threads: int) -> None:
        assert self.mask.all(), "whole warps"
        state = self.shared_block.meetings
        with self.shared_block.lock:
            entry = state.setdefault(number, [0, 0])
            turn = entry[1]
            entry[0] += WARP
            if entry[0] == threads:
                state[number] = [0, turn + 1]
                return
        self._until(lambda: state[number][1] > turn)

    def make_barrier(self, at: int, arrivals: int) -> None:
        self.shared_block.barriers[at] = [arrivals, 0, 0, 0]

    def made_barriers(self) -> None:
        pass

    def _barrier(self, at: Any) -> list[int]:
        return self.shared_block.barriers[self._uniform(at)]

    def _arrived(self, barrier: list[int], arrivals: int, size: int) -> None:
        with self.shared_block.lock:
            barrier[1] += arrivals
            barrier[2] += size
            if barrier[1] == barrier[0] and not barrier[2]:
                barrier[1], barrier[3] = 0, barrier[3] + 1
            assert barrier[1] <= barrier[0]

    def arrive(self, at: Any) -> None:
        self._arrived(self._barrier(at), int(self.mask.sum()), 0)

    def meet_warp(self) -> None:
        assert self.mask.all(), "whole warps"

    def arrive_warp(self, at: Any) -> None:
        assert self.mask.all(), "whole warps"
        self._arrived(self._barrier(at), 1, 0)

    def expect(self, at: Any, size: Any) -> None:
        self._arrived(self._barrier(at), 1, self._uniform(size))

    def wait(self, at: Any, parity: Any) -> None:
        barrier, parity = self._barrier(at), self._uniform(parity)
        self._until(lambda: barrier[3] % 2 != parity)

    def copy(self, to: Any, source: np.ndarray, size: Any, barrier: Any) -> None:
        to, size = self._uniform(to), self._uniform(size)
        assert to % 16 == size % 16 == 0
        array, places = self._found(source, np.uint8)
        assert places[0] % 16 == 0
        assert places[0] + size <= len(array)
        self.shared_block.memory[to : to + size] = array[places[0] : places[0] + size]
        self._arrived(self._barrier(barrier), 0, -size)


def _halves(pairs: Sequence[np.ndarray]) -> np.ndarray:
    """float64[len(pairs), 2, 32]: two numbers of each register."""
    bits = np.array(pairs)
    halves = np.stack([bits << 16, bits & 0xFFFF0000], axis=1)
    return (halves & 0xFFFFFFFF).astype(np.uint32).view(np.float32).astype(np.float64)


def run(
    body: Callable[[SimulatedWarps], None], arrays: Sequence[np.ndarray], blocks: int, warps: int, shared: int,
    seconds: float = 60.0,
) -> None:  # fmt: skip
    """Runs a kernel, which changes `arrays` (each contiguous) in place."""
    flat = [x.reshape(-1).view(np.uint8) for x in arrays]
    deadline, faults, threads = time.monotonic() + seconds, [], []
    all_blocks = [Block(shared, deadline) for _ in range(blocks)]

    def one(block: int, warp: int) -> None:
        try:
            with np.errstate(invalid="ignore"):
                body(SimulatedWarps(flat, all_blocks[block], block, warp))
        except BaseException as error:
            faults.append(error)
            for x in all_blocks:
                x.failed.set()

    for block in range(blocks):
        threads += [threading.Thread(target=one, args=(block, warp)) for warp in range(warps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    others = [x for x in faults if not isinstance(x, Stuck)]
    if faults:
        raise (others or faults)[0]
