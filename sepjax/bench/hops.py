"""What it costs the blocks of a GPU to hand each other a vector, again and again, in one kernel; and to read memory.

    python -m sepjax.bench.hops [--check]      --check: compile only, for an H100 that is not there
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax._src.interpreters import mlir
from jaxlib.mlir import ir

from sepjax.model.one_row.warps import Number, Warps

BLOCKS, THREADS, HOPS = 132, 256, 200


def by_flags(size: int, copies: int, hops: int, m: Warps) -> None:
    """Each block writes its part as packets of 32 bits and a flag; all read all of them."""
    packets, out = m.address(0), m.address(1)
    part = -(-size // BLOCKS)

    def hop(i: Number, last: Number) -> list[Number]:
        flag, at = i + 1, packets + m.wide((i % 2) * (8 * size * copies))
        mine = m.block * part + m.thread
        def send() -> None:
            for c in range(copies):
                m.send(at + m.wide(mine * 8 + 8 * size * c), mine + last, flag)
        m.when(m.both(m.thread < part, mine < size), send)
        return [_read_all(m, size, at + m.wide(m.block % copies * (8 * size)), flag, last)]

    (last,) = m.loop(0, hops, 1, hop, m.integer(0))
    m.when(m.thread.same(0), lambda: m.store(out + m.wide(m.block * 4), last))


def _read_all(m: Warps, size: int, at: Number, flag: Number, last: Number) -> Number:
    for first in range(0, size, 4 * THREADS):
        four = [m.thread + (first + j * THREADS) for j in range(min(4, -(-(size - first) // THREADS)))]
        places = [at + m.wide(m.select(x < size, x, m.thread % size) * 8) for x in four]
        for x, found in zip(four, m.receive(places, flag), strict=True):
            m.when(x < size, lambda x=x, found=found: m.keep(x * 4, found))
    m.meet(1, THREADS)
    found = m.shared(((m.thread * 7) % size) * 4)
    m.meet(1, THREADS)
    return found & 0


def by_counter(size: int, hops: int, m: Warps) -> None:
    """Each block writes its part, counts itself and waits for the others' count."""
    numbers, counter, out = m.address(0), m.address(1), m.address(2)
    part = -(-size // BLOCKS)

    def hop(i: Number, last: Number) -> list[Number]:
        at = numbers + m.wide((i % 2) * (4 * size))
        mine = m.block * part + m.thread
        m.when(m.both(m.thread < part, mine < size), lambda: m.store(at + m.wide(mine * 4), mine + last))
        m.meet(1, THREADS)

        def count() -> None:
            m._ptx("red.release.gpu.global.add.u32 [$0], 1;", [counter])
            m._ptx(
                "{ .reg .pred q; .reg .b32 f; L${:uid}: ld.acquire.gpu.global.u32 f, [$0]; setp.lo.u32 q, f, $1; "
                "@q bra L${:uid}; }".replace("L${:uid}", "L${:uid}"),
                [counter, (i + 1) * BLOCKS],
            )

        m.when(m.thread.same(0), count)
        m.meet(1, THREADS)
        if size:
            for first in range(0, size, THREADS):
                x = m.thread + first
                m.when(x < size, lambda x=x: m.keep(x * 4, m._ptx("ld.relaxed.gpu.global.b32 $0, [$1];", [at + m.wide(x * 4)], [m.i32])))
            m.meet(1, THREADS)
        found = m.shared(((m.thread * 7) % max(size, 1)) * 4)
        m.meet(1, THREADS)
        return [found & 0]

    (last,) = m.loop(0, hops, 1, hop, m.integer(0))
    m.when(m.thread.same(0), lambda: m.store(out + m.wide(m.block * 4), last))


def reading(stages: int, size: int, chunks: int, apart: bool, m: Warps) -> None:
    """A ring in shared memory, through which a block's chunks of a large array go; nobody looks at them."""
    array, out = m.address(0), m.address(1)
    ring = 1024

    def start() -> None:
        for s in range(stages):
            m.make_barrier(8 * s, 1)
        m.made_barriers()

    m.when(m.thread.same(0), start)
    m.meet(1, THREADS)

    def ask(i: Number) -> None:
        s = i % stages
        m.expect(s * 8, size)
        m.copy(s * size + ring, array + m.wide(m.block * chunks + i if apart else i * BLOCKS + m.block) * m.wide(size), size, s * 8)

    def all_of_them() -> None:
        m.loop(0, min(stages, chunks), 1, lambda i: ask(i))

        def use(i: Number) -> None:
            m.wait((i % stages) * 8, (i // stages) % 2)
            m.when(i + stages < chunks, lambda: ask(i + stages))

        m.loop(0, chunks, 1, use)
        m.store(out + m.wide(m.block * 4), m.shared(ring))

    m.when(m.thread.same(0), all_of_them)


def kernel(body: object, ins: tuple, inouts: tuple, shared: int) -> object:
    def run(_: object, *refs: object) -> None:
        *arrays, (memory,) = refs
        body(Warps(arrays, memory))  # pyright: ignore

    with mlir.make_ir_context(), ir.Location.unknown():
        return mgpu.as_gpu_kernel(
        run, (BLOCKS, 1, 1), (THREADS, 1, 1), ins, jax.ShapeDtypeStruct((BLOCKS,), jnp.int32),
        (jax.ShapeDtypeStruct((shared,), jnp.int8),), module_name="hops", inout_shape=inouts,
    )  # fmt: skip


def s(*shape: int, dtype: object = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


CHUNKS = 200


def cases() -> dict:
    found = {"counter, nothing read": (by_counter, (0,), (), (s(2), s(1)), 1024)}
    for size in (288, 768, 2048):
        found[f"counter, {size} x 4 bytes"] = by_counter, (size,), (), (s(2 * size), s(1)), 4 * size + 1024
        for copies in (1, 2, 4, 8):
            found[f"flags, {size} x 4 bytes, {copies} copies"] = by_flags, (size, copies), (), (s(4 * size * copies),), 4 * size + 1024
    sizes = (2, 32), (3, 32), (4, 32), (3, 16), (4, 16), (6, 16), (8, 8), (12, 8), (3, 48), (2, 64), (3, 64), (2, 96), (4, 48)
    for stages, size in sizes:
        for apart in (False, True):
            chunks = 12800 // size
            array = s(chunks * BLOCKS * size * 256)
            name = f"reading, {stages} x {size} KiB{', apart' if apart else ''}"
            found[name] = reading, (stages, size * 1024, chunks, apart), (array,), (), stages * size * 1024 + 1024
    return found


def main() -> None:
    check = "--check" in sys.argv
    if check:
        sys.path.insert(0, "/tmp/mega")
        import h100

        jax.set_mesh(h100.mesh())
    print(jax.__version__, jax.devices(), flush=True)
    for name, (body, static, ins, inouts, shared) in cases().items():
        if not any(name.startswith(x) for x in sys.argv[1:] if x != "--check") and sys.argv[1:] not in ([], ["--check"]):
            continue
        try:
            of = (HOPS,) if body is not reading else ()
            make = lambda n: kernel(functools.partial(body, *static, *n), ins, inouts, shared)  # noqa: E731
            run = make(of)
            def op(*given):  # noqa
                zeros = [jnp.zeros(x.shape, x.dtype) for x in inouts]
                return run(*given, *zeros)
            if check:
                jax.jit(op).lower(*ins).compile()
                print("compiles:", name, flush=True)
                continue
            given = [jnp.ones(x.shape, x.dtype) for x in ins]
            timed = jax.jit(lambda *given: jax.lax.fori_loop(0, 20, lambda i, acc: acc + jax.tree.leaves(op(*given))[0].ravel()[0], 0))
            timed(*given).block_until_ready()
            best = 1e9
            for _ in range(5):
                begin = time.perf_counter()
                timed(*given).block_until_ready()
                best = min(best, (time.perf_counter() - begin) / 20)
            if body is reading:
                print(f"{name}: {best * 1e6:.1f} us, {static[2] * BLOCKS * static[1] / best / 1e12:.3f} TB/s", flush=True)
            else:
                print(f"{name}: {best * 1e6:.1f} us for {HOPS} hops, {best / HOPS * 1e6:.3f} us each with launches", flush=True)
        except Exception as error:  # noqa: BLE001
            print(f"{name}: {type(error).__name__}: {str(error)[:3000]}", flush=True)


if __name__ == "__main__":
    main()
