"""Commands that have another name now: whoever runs them is told."""

import sys

_NOW = {
    "sepjax.generate": "generate (with --chat: python -m sepjax chat)",
    "sepjax.hub": "convert",
    "sepjax.sharding": "plan",
    "sepjax.distill": "distill",
    "sepjax.keeping": "keeping",
    "sepjax.attention.bench": "bench attention",
    "sepjax.attention.kernel_bench": "bench kernels",
    "sepjax.training.bench": "bench training",
    "sepjax.data.bench": "bench data",
    "sepjax.generation.bench": "bench generation",
    "sepjax.generation.step_bench": "bench steps",
    "sepjax.mesh_bench": "bench mesh",
}


def refuse(module: str) -> None:
    """Ends the program with a line where `python -m MODULE` is one of them."""
    if module in _NOW:
        print(f"error: python -m {module} is another command now: python -m sepjax {_NOW[module]}", file=sys.stderr)
        raise SystemExit(2)
