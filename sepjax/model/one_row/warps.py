"""What a thread of a Hopper GPU does, as Python that writes it down: numbers, memory and barriers of a kernel.

A kernel is a function of a `Warps`, written once for all threads. `Warps` gives it Mosaic GPU's IR with PTX for what
touches memory; tests give it one of NumPy, a number being the 32 of a warp (`tests/model/simulated_warps.py`). A number
is a 32-bit integer or float, an address in global memory a 64-bit integer, one in shared memory bytes from its start.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

WARP = 32


class Number:
    """A value of a thread, with Python's operators. Integers are taken for non-negative where they are divided."""

    def __init__(self, value: Any):
        self.value = value

    @property
    def is_float(self) -> bool:
        """Whether it is one."""
        return isinstance(self.value.type, ir.F32Type)

    def _with(self, other: Any) -> tuple[Any, Any]:
        return self.value, _of(other, self.value.type)

    def _made(self, other: Any, of_floats: Any, of_integers: Any, *, turned: bool = False) -> "Number":
        a, b = self._with(other)
        a, b = (b, a) if turned else (a, b)
        return Number((of_floats if self.is_float else of_integers)(a, b))

    def __add__(self, other: Any) -> "Number":
        return self._made(other, arith.addf, arith.addi)

    def __sub__(self, other: Any) -> "Number":
        return self._made(other, arith.subf, arith.subi)

    def __rsub__(self, other: Any) -> "Number":
        return self._made(other, arith.subf, arith.subi, turned=True)

    def __mul__(self, other: Any) -> "Number":
        return self._made(other, arith.mulf, arith.muli)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: Any) -> "Number":
        return self._made(other, None, arith.divui)

    def __mod__(self, other: Any) -> "Number":
        return self._made(other, None, arith.remui)

    def __and__(self, other: Any) -> "Number":
        return self._made(other, None, arith.andi)

    def __or__(self, other: Any) -> "Number":
        return self._made(other, None, arith.ori)

    def __xor__(self, other: Any) -> "Number":
        return self._made(other, None, arith.xori)

    def __lshift__(self, other: Any) -> "Number":
        return self._made(other, None, arith.shli)

    def __rshift__(self, other: Any) -> "Number":
        return self._made(other, None, arith.shrui)

    def _compared(self, other: Any, of_floats: Any, of_integers: Any) -> "Number":
        a, b = self._with(other)
        if self.is_float:
            return Number(arith.cmpf(of_floats, a, b))
        return Number(arith.cmpi(of_integers, a, b))

    def __lt__(self, other: Any) -> "Number":
        return self._compared(other, arith.CmpFPredicate.OLT, arith.CmpIPredicate.slt)

    def __ge__(self, other: Any) -> "Number":
        return self._compared(other, arith.CmpFPredicate.OGE, arith.CmpIPredicate.sge)

    def same(self, other: Any) -> "Number":
        """Whether they are equal."""
        return self._compared(other, arith.CmpFPredicate.OEQ, arith.CmpIPredicate.eq)


def _of(x: Any, of_type: Any) -> Any:
    """The IR's value of a number or a Python one."""
    if isinstance(x, Number):
        return x.value
    return arith.constant(of_type, ir.FloatAttr.get(of_type, float(x)) if isinstance(of_type, ir.F32Type) else int(x))


class Warps:
    """Writes a kernel down as Mosaic GPU's IR.

    arrays: the memrefs of what it is given, or pairs of one and bytes to its part; shared: the memref of its memory.
    """

    def __init__(self, arrays: Sequence[Any], shared: Any):
        self.i1, self.i32, self.i64 = (ir.IntegerType.get_signless(n) for n in (1, 32, 64))
        self.f32 = ir.F32Type.get()
        self._addresses = [self._address(x) for x in arrays]
        pointer = utils.memref_ptr(shared)
        plain = llvm.addrspacecast(llvm.PointerType.get(3), pointer) if "<3>" not in str(pointer.type) else pointer
        self._shared = Number(llvm.ptrtoint(self.i32, plain))
        index = gpu.thread_id(gpu.Dimension.x)
        self.thread = Number(arith.index_cast(self.i32, index))
        self.block = Number(arith.index_cast(self.i32, gpu.block_id(gpu.Dimension.x)))
        self.lane = self.thread % WARP
        self.warp = Number(utils._warp_bcast((self.thread // WARP).value))

    def _address(self, ref: Any) -> Number:
        ref, first = ref if isinstance(ref, tuple) else (ref, 0)
        return Number(llvm.ptrtoint(self.i64, utils.memref_ptr(ref))) + first

    # -- numbers ----------------------------------------------------------------------------------------------------

    def integer(self, x: int) -> Number:
        """A number as 32 bits."""
        return Number(_of(x, self.i32))

    def float(self, x: float) -> Number:
        """A number as a float."""
        return Number(_of(x, self.f32))

    def wide(self, x: Any) -> Number:
        """An integer as one of 64 bits."""
        return Number(arith.extui(self.i64, x.value)) if isinstance(x, Number) else Number(_of(x, self.i64))

    def as_bits(self, x: Number) -> Number:
        """A float as the integer of its bits."""
        return Number(arith.bitcast(self.i32, x.value))

    def as_float(self, x: Number) -> Number:
        """An integer as the float of its bits."""
        return Number(arith.bitcast(self.f32, x.value))

    def select(self, condition: Number, a: Any, b: Any) -> Number:
        """a where the condition holds, else b."""
        of_type = (a if isinstance(a, Number) else b).value.type
        return Number(arith.select(condition.value, _of(a, of_type), _of(b, of_type)))

    def same(self, a: Number, b: Any) -> Number:
        """Whether they are equal."""
        return a.same(b)

    def both(self, a: Number, b: Number) -> Number:
        """Whether both hold."""
        return Number(arith.andi(a.value, b.value))

    def _ptx(
        self, text: str, given: Sequence[Number], results: Sequence[Any] = (), *, volatile: bool = True,
        convergent: bool | None = None,
    ) -> Any:  # fmt: skip
        letters = {"i32": "r", "i64": "l", "f32": "f"}
        names = [f"={letters[str(t)]}" for t in results] + [letters[str(x.value.type)] for x in given]
        kind = ir.Type.parse("!llvm.void") if not results else results[0]
        if len(results) > 1:
            kind = llvm.StructType.get_literal(list(results))
        found = llvm.inline_asm(
            kind, [x.value for x in given], text, ",".join(names + (["~{memory}"] if volatile else [])),
            has_side_effects=volatile, convergent=volatile if convergent is None else convergent,
        )  # fmt: skip
        if len(results) > 1:
            return [Number(llvm.extractvalue(t, found, [i])) for i, t in enumerate(results)]
        return Number(found) if results else None

    def fma(self, a: Number, b: Number, c: Number) -> Number:
        """a b + c, rounded once."""
        return Number(self._ptx("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], [self.f32], volatile=False).value)

    def larger(self, a: Number, b: Number) -> Number:
        """The larger of two floats."""
        return self._ptx("max.f32 $0, $1, $2;", [a, b], [self.f32], volatile=False)

    def exp2(self, x: Number) -> Number:
        """Two to the power of x, to 22 bits."""
        return self._ptx("ex2.approx.ftz.f32 $0, $1;", [x], [self.f32], volatile=False)

    def rsqrt(self, x: Number) -> Number:
        """1 / the root of x, to 22 bits."""
        return self._ptx("rsqrt.approx.f32 $0, $1;", [x], [self.f32], volatile=False)

    def reciprocal(self, x: Number) -> Number:
        """1 / x, to 23 bits."""
        return self._ptx("rcp.approx.ftz.f32 $0, $1;", [x], [self.f32], volatile=False)

    def low_half(self, pair: Number) -> Number:
        """The first of two bfloat16 in 32 bits, as a float."""
        return self.as_float(pair << 16)

    def high_half(self, pair: Number) -> Number:
        """The second of two bfloat16, as a float."""
        return self.as_float(pair & -65536)

    def pair(self, low: Number, high: Number) -> Number:
        """Two floats rounded to bfloat16, in 32 bits."""
        return self._ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", [low, high], [self.i32], volatile=False)

    def from_lane_xor(self, x: Number, distance: int) -> Number:
        """The number of another lane; all lanes of the warp ask."""
        if x.is_float:
            return self.as_float(self.from_lane_xor(self.as_bits(x), distance))
        return self._ptx(f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;", [x], [self.i32])

    def products(self, a: Sequence[Number], b: Sequence[Number], c: Sequence[Number]) -> list[Number]:
        """c + a b of a warp's tensor core, of pairs of bfloat16: c float32[16, 8], a [16, 16], b [16, 8].

        Lane 4 g + t has c[g, 2 t], c[g, 2 t + 1] and the same of g + 8; a[g, 2 t : 2 t + 2], of g + 8, and both of
        columns 8 on; and b[2 t : 2 t + 2, g] and [8 + 2 t : 10 + 2 t, g].
        """
        text = (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
            "{$10, $11, $12, $13};"
        )
        return self._ptx(text, [*a, *b, *c], [self.f32] * 4, volatile=False, convergent=True)

    def code_products(self, a: Sequence[Number], b: Sequence[Number], c: Sequence[Number]) -> list[Number]:
        """c + a b of whole numbers, four of 8 bits in 32: c int32[16, 8], a [16, 32], b [32, 8].

        As `products`: lane 4 g + t has a[g, 4 t : 4 t + 4], of g + 8, and both of columns 16 on; and
        b[4 t : 4 t + 4, g] and [16 + 4 t : 20 + 4 t, g].
        """
        text = (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
            "{$10, $11, $12, $13};"
        )
        return self._ptx(text, [*a, *b, *c], [self.i32] * 4, volatile=False, convergent=True)

    def bytes_of(self, a: Number, b: Number, chosen: int) -> Number:
        """Four bytes of a's (0 to 3) and b's (4 to 7), which `chosen` has a digit each of, the first one last."""
        return self._ptx(f"prmt.b32 $0, $1, $2, {chosen};", [a, b], [self.i32], volatile=False)

    def as_number(self, x: Number) -> Number:
        """A whole number with its sign as a float."""
        return Number(arith.sitofp(self.f32, x.value))

    # -- what is done -----------------------------------------------------------------------------------------------

    def when(self, condition: Number, body: Callable[[], None]) -> None:
        """By the threads for which it holds."""
        op = scf.IfOp(condition.value)
        with ir.InsertionPoint(op.then_block):
            body()
            scf.yield_([])

    def loop(self, begin: Any, end: Any, step: int, body: Callable[..., Any], *carried: Number) -> list[Number]:
        """body(i, *carried) for each number, the same for all threads of a warp; it returns what is carried on."""
        bounds = [_of(x, self.i32) for x in (begin, end, step)]
        begin, end, step = bounds
        op = scf.ForOp(begin, end, step, [x.value for x in carried])
        with ir.InsertionPoint(op.body):
            found = body(Number(op.induction_variable), *(Number(x) for x in op.inner_iter_args))
            scf.yield_([x.value for x in (found or ())])
        return [Number(x) for x in op.results_]

    # -- global memory ----------------------------------------------------------------------------------------------

    def address(self, i: int) -> Number:
        """Where the array lies that was given as number i."""
        return self._addresses[i]

    def load(self, at: Number) -> Number:
        """32 bits that nobody writes meanwhile."""
        return self._ptx("ld.global.b32 $0, [$1];", [at], [self.i32])

    def store(self, at: Number, x: Number) -> None:
        """Writes 32 bits."""
        self._ptx("st.global.b32 [$0], $1;", [at, x])

    def store_half(self, at: Number, x: Number) -> None:
        """The lower 16 bits of x."""
        self._ptx("{ .reg .b16 l, h; mov.b32 {l, h}, $1; st.global.b16 [$0], l; }", [at, x])

    def send(self, at: Number, x: Number, flag: Number) -> None:
        """Writes 32 bits and a flag as one: whoever sees the flag has the bits."""
        self._ptx("{ .reg .b64 t; mov.b64 t, {$1, $2}; st.relaxed.gpu.global.b64 [$0], t; }", [at, x, flag])

    def receive(self, places: Sequence[Number], flag: Number) -> list[Number]:
        """The bits of every place, once all have this flag."""
        n, label = len(places), "L${:uid}"
        asked = " ".join(f"ld.relaxed.gpu.global.b64 t{i}, [${n + i}];" for i in range(n))
        split = " ".join(f"mov.b64 {{${i}, f{i}}}, t{i};" for i in range(n))
        looked = " ".join(f"xor.b32 f{i}, f{i}, ${2 * n};" for i in range(n))
        joined = " ".join(f"or.b32 f0, f0, f{i};" for i in range(1, n))
        names = f".reg .b64 t<{n}>; .reg .b32 f<{n}>; .reg .pred q;"
        text = f"{{ {names} {label}: {asked} {split} {looked} {joined} setp.ne.b32 q, f0, 0; @q bra {label}; }}"
        found = self._early(text, [*places, flag], [self.i32] * n)
        return found if n > 1 else [found]

    def _early(self, text: str, given: Sequence[Number], results: Sequence[Any]) -> Any:
        """As `_ptx`, of results that are written before all that is given was read."""
        letters = {"i32": "r", "i64": "l", "f32": "f"}
        names = [f"=&{letters[str(t)]}" for t in results] + [letters[str(x.value.type)] for x in given] + ["~{memory}"]
        kind = results[0] if len(results) == 1 else llvm.StructType.get_literal(list(results))
        found = llvm.inline_asm(
            kind, [x.value for x in given], text, ",".join(names), has_side_effects=True, convergent=True
        )
        if len(results) == 1:
            return Number(found)
        return [Number(llvm.extractvalue(t, found, [i])) for i, t in enumerate(results)]

    # -- shared memory ----------------------------------------------------------------------------------------------

    def _at(self, at: Any) -> Number:
        return self._shared + at

    def shared(self, at: Any) -> Number:
        """32 bits of shared memory."""
        return self._ptx("ld.shared.b32 $0, [$1];", [self._at(at)], [self.i32])

    def shared_float(self, at: Any) -> Number:
        """A float of shared memory."""
        return self._ptx("ld.shared.f32 $0, [$1];", [self._at(at)], [self.f32])

    def shared_four(self, at: Any) -> list[Number]:
        """Four times 32 bits in a row."""
        return self._ptx("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", [self._at(at)], [self.i32] * 4)

    def shared_wide(self, at: Any) -> Number:
        """64 bits of shared memory."""
        return self._ptx("ld.shared.b64 $0, [$1];", [self._at(at)], [self.i64])

    def keep(self, at: Any, x: Number) -> None:
        """Writes a number to shared memory."""
        kind = "b64" if x.value.type == self.i64 else "f32" if x.is_float else "b32"
        self._ptx(f"st.shared.{kind} [$0], $1;", [self._at(at), x])

    # -- who waits for whom -----------------------------------------------------------------------------------------

    def meet(self, number: int, threads: int) -> None:
        """Waits for so many threads of the block, whole warps."""
        self._ptx(f"bar.sync {number}, {threads};", [])

    def make_barrier(self, at: Any, arrivals: int) -> None:
        """A barrier at a place in shared memory, by one thread."""
        self._ptx(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", [self._at(at)])

    def made_barriers(self) -> None:
        """Makes barriers known to copies, by the thread that made them."""
        self._ptx("fence.mbarrier_init.release.cluster;", [])
        self._ptx("fence.proxy.async.shared::cta;", [])

    def arrive(self, at: Any) -> None:
        """Arrives at a barrier."""
        self._ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", [self._at(at)])

    def meet_warp(self) -> None:
        """What a warp's lanes have written to shared memory is there for all of them."""
        self._ptx("bar.warp.sync 0xffffffff;", [])

    def arrive_warp(self, at: Any) -> None:
        """Once for all lanes of the warp, after all of them."""
        self.meet_warp()
        self.when(self.same(self.lane, 0), lambda: self.arrive(at))

    def expect(self, at: Any, size: Any) -> None:
        """Arrives, and says how many bytes will be copied."""
        size = size if isinstance(size, Number) else self.integer(size)
        self._ptx("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", [self._at(at), size])

    def wait(self, at: Any, parity: Number) -> None:
        """Waits until the phase of this parity is complete."""
        label = "L${:uid}"
        text = (
            "{ .reg .pred q; "
            + label
            + ": mbarrier.try_wait.parity.shared::cta.b64 q, [$0], $1; @!q bra "
            + label
            + "; }"
        )
        self._ptx(text, [self._at(at), parity])

    def copy(self, to: Any, source: Number, size: Any, barrier: Any) -> None:
        """Starts a copy of bytes to shared memory, all multiples of 16."""
        size = size if isinstance(size, Number) else self.integer(size)
        self._ptx(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
            [self._at(to), source, size, self._at(barrier)],
        )
