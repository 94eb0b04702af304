"""The kernel of a whole step, against float32, and its time."""
import sys, time, functools
import numpy as np, jax, jax.numpy as jnp
from sepjax.model.one_row import call
from sepjax.model.one_row.shape import Shape
from sepjax.generation.graphs import compiler_options

SH = {"smol2": Shape(2, 576, 9, 3, 64, 1536, 896, (4, 68), 1e-5, 132), "smol": Shape(30, 576, 9, 3, 64, 1536, 896, (4, 68), 1e-5, 132),
      "8b1": Shape(1, 4096, 32, 8, 128, 14336, 896, (4, 68), 1e-5, 132), "8b": Shape(32, 4096, 32, 8, 128, 14336, 896, (4, 68), 1e-5, 132)}


def shape_of(name):
    import dataclasses
    name, *more = name.split("@")
    return dataclasses.replace(SH[name], **({"blocks": int(more[0]), "copies": int(more[1])} if more else {}))


@functools.partial(jax.jit, static_argnums=0)
def make(s, key):
    ks = iter(jax.random.split(key, 12))
    n = lambda *a: (jax.random.normal(next(ks), a) / a[-1] ** 0.5).astype(jnp.bfloat16)
    layer = (n((s.N + 2 * s.K) * s.H, s.D), n(s.D, s.N * s.H), n(2 * s.F, s.D), n(s.D, s.F), 1 + 0.1 * jax.random.normal(next(ks), (s.D,)), 1 + 0.1 * jax.random.normal(next(ks), (s.D,)))
    c = lambda: jax.random.normal(next(ks), (s.K, s.C, s.H)).astype(jnp.bfloat16)
    return layer, c(), c()


def told_of(s):
    r = np.random.default_rng(0)
    ang = r.normal(size=(s.zones, s.H // 2)) * 3
    visible = np.arange(s.C) < 560
    bias = np.where(visible, 0, -np.inf).astype(np.float32)
    return [jnp.asarray(x) for x in (np.cos(ang).astype(np.float32), np.sin(ang).astype(np.float32), bias, np.array([600], np.int32), np.ones(s.D, np.float32))], jnp.asarray(visible)


def plain(s, f, layers, x, told, k, v, visible):
    """In type f."""
    cos, sin = told[:2]
    zone = np.searchsorted(np.array(s.ends), np.arange(s.C), side="right") if s.ends else np.zeros(s.C, int)
    x = x.astype(f); hp = dict(precision="highest")
    norm = lambda x, g: ((lambda y: y * jax.lax.rsqrt(jnp.mean(y * y) + s.epsilon) * g)(x.astype(jnp.float32))).astype(f)
    def rot(u, z):
        h = s.H // 2; a, b = u[..., :h].astype(jnp.float32), u[..., h:].astype(jnp.float32)
        return jnp.concatenate([a * cos[z] - b * sin[z], b * cos[z] + a * sin[z]], -1)
    for (q, o, gu, d, n1, n2), kc, vc in zip(layers, k, v):
        q, o, gu, d = (y.astype(f) for y in (q, o, gu, d))
        p = jnp.einsum("oi,i->o", q, norm(x, n1), **hp); N, K, H = s.N, s.K, s.H
        Q, kk, vv = p[: N * H].reshape(K, N // K, H), p[N * H : (N + K) * H].reshape(K, H), p[(N + K) * H :].reshape(K, H)
        knew = rot(kk, s.zones - 1).astype(jnp.bfloat16).astype(f)
        qz = jnp.stack([rot(Q, z).astype(f) for z in range(s.zones)])[zone]  # C K G H
        sc = jnp.einsum("ckgh,kch->kgc", qz, kc.astype(f), preferred_element_type=jnp.float32, **hp)
        sc = jnp.where(visible, sc, -jnp.inf)
        own = jnp.einsum("kgh,kh->kg", rot(Q, s.zones - 1).astype(f), knew, preferred_element_type=jnp.float32, **hp)[..., None]
        w = jax.nn.softmax(jnp.concatenate([sc, own], -1) * s.H**-0.5, -1)
        out = jnp.einsum("kgc,kch->kgh", w[..., :-1].astype(f), vc.astype(f), preferred_element_type=jnp.float32, **hp) + w[..., -1:] * vv[:, None].astype(jnp.float32)
        x = x + jnp.einsum("oi,i->o", o, out.astype(f).reshape(-1), **hp)
        h = jnp.einsum("oi,i->o", gu, norm(x, n2), **hp)
        x = x + jnp.einsum("oi,i->o", d, jax.nn.silu(h[: s.F]) * h[s.F :], **hp)
    return norm(x, 1.0)


def check(name):
    s = shape_of(name)
    told, visible = told_of(s)
    made = [make(s, jax.random.key(i)) for i in range(s.L)]
    layers, k, v = (tuple(m[j] for m in made) for j in range(3))
    x = jax.random.normal(jax.random.key(9), (s.D,)).astype(jnp.bfloat16)
    run = jax.jit(functools.partial(call.run, s))
    exact, rough = (np.asarray(jax.jit(functools.partial(plain, s, f))(layers, x, told, k, v, visible), np.float32) for f in (jnp.float32, jnp.bfloat16))
    got = run(layers, x, told, k, v)
    a = np.asarray(got[0], np.float32)
    again = [np.asarray(run(layers, x, told, k, v)[0], np.float32) for _ in range(20)]
    print(name, "error", np.sqrt(np.mean((a - exact) ** 2)), "plain bf16", np.sqrt(np.mean((rough - exact) ** 2)), "size", np.sqrt(np.mean(exact**2)), "same bits", all((a == b).all() for b in again), flush=True)


def timing(name, steps=50):
    s = shape_of(name)
    told, _ = told_of(s)
    made = [make(s, jax.random.key(i)) for i in range(s.L)]
    layers, k, v = (tuple(m[j] for m in made) for j in range(3))
    nbytes = sum(y.nbytes for y in jax.tree.leaves(layers))
    x = jax.random.normal(jax.random.key(9), (s.D,)).astype(jnp.bfloat16)
    def loop(layers, x, k, v):
        def body(i, c):
            x, k, v = c
            h, k, v = call.run(s, layers, x, told, k, v)
            return (x + 0 * h, k, v)
        return jax.lax.fori_loop(0, steps, body, (x, k, v))
    run = jax.jit(loop, donate_argnums=(2, 3), compiler_options=compiler_options())
    x2, k, v = run(layers, x, k, v); x2.block_until_ready()
    times = []
    for _ in range(7):
        t = time.perf_counter(); x2, k, v = run(layers, x, k, v); x2.block_until_ready(); times.append((time.perf_counter() - t) / steps)
    print(f"{name}: best {min(times) * 1e6:.1f} us a step, median {sorted(times)[3] * 1e6:.1f}; {nbytes / min(times) / 1e12:.3f} TB/s by layers' weights", flush=True)


def steps(name):
    """Whole steps as `bench steps` has them, with the kernel and without, in turns; and their tokens."""
    import dataclasses, os
    from sepjax.config import AttentionConfig, ModelConfig
    from sepjax.bench.steps import full_cache, random_params, memory_bandwidth, _nbytes
    from sepjax.generation.cache.sizes import StreamSizes
    from sepjax.generation.device_loop import DecodeState, Request, make_advance
    from sepjax.generation.sampling import Sampling
    from sepjax.model.transformer import abstract
    from sepjax.model.unrolled import by_layer
    import types
    m = {"smol": ModelConfig(49152, 30, 576, 9, 3, 64, 1536, dtype="bfloat16"),
         "8b": ModelConfig(128256, 32, 4096, 32, 8, 128, 14336, dtype="bfloat16", tie_embeddings=False)}[name]
    a = AttentionConfig(num_sinks=4, max_separators=64, window_size=256, cache_size=800)
    graph, shapes = abstract(m, a)
    params = random_params(jax.eval_shape(lambda x: by_layer(x, m), shapes))
    params["embedding"]["embedding"] = params["embedding"]["embedding"] * 20
    sizes = StreamSizes.create(m, a)
    bandwidth = memory_bandwidth()
    table = jax.random.uniform(jax.random.key(1), (m.vocab_size,)) < 0.12
    request = Request(table, Sampling.create(), jnp.full(1, -1), jnp.int32(-1))
    runs = {}
    real = call.run
    for kind in ("1", "0", "rest"):
        os.environ["SEPJAX_ONE_ROW"] = "0" if kind == "0" else "1"
        call.run = real if kind != "rest" else lambda shape, layers, x, told, k, v: (x * told[0][0, 0].astype(x.dtype) + told[2][0].astype(x.dtype), k, v)
        advance = make_advance.__wrapped__(graph, a, 32)
        state = DecodeState.create(full_cache(types.SimpleNamespace(model=m), sizes, 1), jax.random.split(jax.random.key(0), 1), m.vocab_size)
        t = time.perf_counter()
        got = []
        for _ in range(8):
            state, out = advance(params, state, np.zeros(1, bool), request)
            got += np.asarray(out.token)[0].tolist()
        print(kind, "compiled and 256 steps in", time.perf_counter() - t, flush=True)
        runs[kind] = [advance, state, got, []]
    same = next((i for i, (x, y) in enumerate(zip(runs["1"][2], runs["0"][2])) if x != y), 256)
    print("equal tokens before the first other one:", same, "distinct tokens", len(set(runs["1"][2])), flush=True)
    for _ in range(6):
        for kind in runs:
            run = runs[kind]
            t = time.perf_counter()
            for _ in range(4):
                run[1], out = run[0](params, run[1], np.zeros(1, bool), request)
            out.token.block_until_ready()
            run[3].append((time.perf_counter() - t) / 128 * 1e3)
    weights = _nbytes(params) - (0 if m.tie_embeddings else _nbytes(params["embedding"]))
    for kind in runs:
        best, median = min(runs[kind][3]), sorted(runs[kind][3])[3]
        print(f"{name} SEPJAX_ONE_ROW={kind}: best {best:.4f} ms a step, median {median:.4f}; {weights / bandwidth / best * 1e5:.1f} % of {bandwidth / 1e12:.2f} TB/s", flush=True)


def profile(name):
    """Cycles of each part of a layer, by stamps of each block."""
    s = shape_of(name)
    told, _ = told_of(s)
    made = [make(s, jax.random.key(i)) for i in range(s.L)]
    layers, k, v = (tuple(m[j] for m in made) for j in range(3))
    x = jax.random.normal(jax.random.key(9), (s.D,)).astype(jnp.bfloat16)
    run = jax.jit(lambda *a: call.run(s, *a, kernel=call._kernel(s, timed=True))[1][0])
    for _ in range(3):
        got = np.asarray(run(layers, x, told, k, v)).reshape(s.blocks, s.L, 16).astype(np.int64)
    t = np.concatenate([got[:, :-1, :6], got[:, 1:, :1]], axis=2)
    d = np.diff(t, axis=2) % 2**32
    names = ("qkv", "attend", "join", "out", "into", "down")
    for i, n in enumerate(names):
        y = d[:, 2:, i]
        print(f"{name} {n}: mean {y.mean():.0f}, of blocks least {y.mean(1).min():.0f} most {y.mean(1).max():.0f}", flush=True)
    for b in (0, 1, 17, 18, 41, 42, 95, 100, 119, 125, 131):
        print(name, "block", b, *(f"{n} {y:.0f}" for n, y in zip(names, d[b, 2:].mean(0))), flush=True)
    print(name, "layer", d.sum(2)[:, 2:].mean(), flush=True)


def rest(name):
    """What the step takes around the kernel: with parts of it left out."""
    import dataclasses, os, types
    from sepjax.config import AttentionConfig, ModelConfig
    from sepjax.bench.steps import full_cache, random_params
    from sepjax.generation import device_loop
    from sepjax.generation.cache.bounded import StreamingCache
    from sepjax.generation.cache.sizes import StreamSizes
    from sepjax.generation.device_loop import DecodeState, Request, make_advance
    from sepjax.generation.sampling import Sampling
    from sepjax.model.transformer import abstract
    from sepjax.model.unrolled import by_layer
    m = ModelConfig(49152, 30, 576, 9, 3, 64, 1536, dtype="bfloat16")
    a = AttentionConfig(num_sinks=4, max_separators=64, window_size=256, cache_size=800)
    graph, shapes = abstract(m, a)
    params = random_params(jax.eval_shape(lambda x: by_layer(x, m), shapes))
    sizes = StreamSizes.create(m, a)
    table = jax.random.uniform(jax.random.key(1), (m.vocab_size,)) < 0.12
    request = Request(table, Sampling.create(), jnp.full(1, -1), jnp.int32(-1))
    real_run, real_compact, real_draw = call.run, StreamingCache.compact, device_loop.draw
    fake = lambda shape, layers, x, told, k, v: (x * told[0][0, 0].astype(x.dtype) + told[2][0].astype(x.dtype), k, v)
    def simple(logits, state, request):
        drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return dataclasses.replace(state, token=drawn, count=state.count + 1), device_loop._nothing(logits, drawn)
    runs = {}
    for kind in ("all", "rest", "rest, no compaction", "rest, simple draw", "rest, neither", "all, neither", "rest, graphs off"):
        call.run = real_run if kind.startswith("all") else fake
        StreamingCache.compact = (lambda self: self) if "no compaction" in kind or "neither" in kind else real_compact
        device_loop.draw = simple if "simple" in kind or "neither" in kind else real_draw
        os.environ["SEPJAX_GRAPHS"] = "0" if "off" in kind else "1"
        advance = make_advance.__wrapped__(graph, a, 32)
        state = DecodeState.create(full_cache(types.SimpleNamespace(model=m), sizes, 1), jax.random.split(jax.random.key(0), 1), m.vocab_size)
        state, out = advance(params, state, np.zeros(1, bool), request)
        runs[kind] = [advance, state, []]
    for _ in range(5):
        for kind, run in runs.items():
            t = time.perf_counter()
            for _ in range(4):
                run[1], out = run[0](params, run[1], np.zeros(1, bool), request)
            out.token.block_until_ready()
            run[2].append((time.perf_counter() - t) / 128 * 1e6)
    for kind, run in runs.items():
        print(f"{kind}: best {min(run[2]):.1f} us a step, median {sorted(run[2])[2]:.1f}", flush=True)


if __name__ == "__main__":
    for what in sys.argv[1:]:
        kind, name = what.split(":")
        {"check": check, "time": timing, "steps": steps, "profile": profile, "rest": rest}[kind](name)
