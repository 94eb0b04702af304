"""How a cache prints: one line that says what it has room for. Nothing is read from a device."""

from typing import Any

import jax


class Shown:
    """`repr` of a cache; a dataclass that takes it says repr=False."""

    def __repr__(self) -> str:
        arrays = [x for x in jax.tree.leaves(self) if isinstance(x, jax.Array)]
        size = f", {sum(x.nbytes for x in arrays):,} bytes" if arrays else ""
        return f"{type(self).__name__}({', '.join(_said(x) for x in getattr(self, 'parts', [self]))}{size})"


def _said(cache: Any) -> str:
    k = cache.k if isinstance(cache.k, tuple) else (cache.k,)
    shape = getattr(k[0], "shape", ())
    if len(shape) < 4:  # a tree of shardings, or of what else JAX puts in the place of arrays
        return "no arrays"
    layers, rows = (shape[0], shape[1]) if len(shape) == 5 else (len(k), shape[0])
    sizes = getattr(cache, "sizes", None)
    if sizes is None:
        room = f"room for {shape[-2]} tokens, window {cache.window_size}"
    else:
        room = f"a={sizes.num_sinks} s={sizes.max_separators} w={sizes.window_size} c={sizes.cache_size}"
    return f"{rows} x {layers} layers {room} {getattr(k[0], 'dtype', '')}"
