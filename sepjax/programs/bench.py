"""benchmarks one part of sepjax on the local devices

sepjax bench attention --lengths=2048,32768
"""

import ast
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from sepjax.command.flags import one_line_errors
from sepjax.config import ConfigError, nearest

BENCHES = {  # name -> the module that measures it; each is also python -m MODULE
    "attention": "sepjax.bench.attention",
    "kernels": "sepjax.bench.kernels",
    "training": "sepjax.bench.training",
    "data": "sepjax.bench.data",
    "generation": "sepjax.bench.generation",
    "steps": "sepjax.bench.steps",
    "decode_attention": "sepjax.bench.decode_attention",
    "reading": "sepjax.bench.reading",
    "slots": "sepjax.bench.slots",
    "mesh": "sepjax.bench.mesh",
    "peers": "sepjax.bench.peers",
    "serve": "sepjax.bench.serve",
}


def main(words: Sequence[str]) -> None:
    """Runs a bench, which has flags of its own, as `python -m` would."""
    with one_line_errors():
        module, rest = choose(words)
    sys.argv = [sys.argv[0], *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def about(name: str) -> str:
    """The first line of a bench's docstring, without an import of the bench, which takes seconds."""
    spec = importlib.util.find_spec(BENCHES[name])
    source = Path(spec.origin).read_text() if spec is not None and spec.origin else ""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def choose(words: Sequence[str]) -> tuple[str, list[str]]:
    """(module, its arguments). For --help prints all benches and ends the program."""
    name = words[0] if words else ""
    if name in ("-h", "-help", "--help"):
        width = 2 + max(map(len, BENCHES))
        print("sepjax bench NAME, each with --help:", *(f"  {x:<{width}}{about(x)}" for x in BENCHES), sep="\n")
        raise SystemExit(0)
    if name not in BENCHES:
        said = f"got {name!r}{nearest(name, BENCHES)}" if name else "got none"
        raise ConfigError(f"expected what to measure, one of {', '.join(BENCHES)}: {said}")
    return BENCHES[name], list(words[1:])
