"""Prose that every installation has: Python's language reference and the docstrings of installed packages.

Sources are parsed, never imported. What is kept reads like text: long, mostly letters, few examples and tables.
"""

import ast
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = ("stdlib", "jax", "numpy", "flax", "optax", "orbax")  # Python's own library and declared dependencies
MIN_LENGTH = 300  # characters
_NOT_PROSE = 0.3  # largest share of a docstring's lines that may be examples, tables or rules
_LETTERS = 0.7  # smallest share of letters among its characters, spaces aside
_DENSITY = 0.1  # of long docstrings in a file's bytes, below which parsing it is not worth the time
_SAME_START = 200  # characters; two docstrings that begin alike are one (numpy.ma repeats numpy)
_SKIPPED = {
    "test",
    "tests",
    "testing",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "_vendor",
    "pydoc_data",
    "this.py",
}
_QUOTED = re.compile(rb'"""(.*?)"""', re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")
_EXAMPLE = re.compile(r"\s*(>>>|\.\.\. |[-=~^+|*# ]{4,}$|[|+])")


def source_files(packages: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Names (`numpy/linalg/_linalg.py`) and paths of the packages' source files, tests left out, in order.

    Raises:
      ModuleNotFoundError: a package is not installed.
    """
    for package in packages:
        for folder in _folders(package):
            for parent, folders, files in folder.walk():
                folders[:] = sorted(set(folders) - _SKIPPED)  # where walk() goes next
                for file in (parent / name for name in sorted(files)):
                    if file.suffix == ".py" and file.name not in _SKIPPED and not file.name.startswith("test_"):
                        yield f"{package}/{file.relative_to(folder).as_posix()}", file


def documents(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and texts: the language reference by topic, then the packages' docstrings, no text twice."""
    seen: set[str] = set()
    for name, text in _all_documents(packages):
        start = " ".join(text.split())[:_SAME_START]
        if start not in seen:
            seen.add(start)
            yield name, text


def is_prose(text: str) -> bool:
    """Whether a docstring is long and reads like text rather than like a console or a table."""
    lines = [line for line in text.splitlines() if line.strip()]
    visible, letters = len("".join(text.split())), sum(map(len, _WORD.findall(text)))
    return (
        len(text) >= MIN_LENGTH
        and sum(_EXAMPLE.match(line) is not None for line in lines) <= _NOT_PROSE * len(lines)
        and letters >= _LETTERS * visible
    )


def _all_documents(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics  # half a megabyte that few callers need

    for name, text in sorted(topics.items()):
        yield f"reference/{name}", text
    for name, file in source_files(packages):
        content = file.read_bytes()
        if sum(len(q) for q in _QUOTED.findall(content) if len(q) >= MIN_LENGTH) > _DENSITY * len(content):
            yield from ((f"{name}:{line}", text) for line, text in _docstrings(content) if is_prose(text))


def _folders(package: str) -> list[Path]:
    if package == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {package!r} of the embedded corpus is not installed", name=package)
    return [Path(location) for location in spec.submodule_search_locations]


def _docstrings(source: bytes) -> Iterator[tuple[int, str]]:
    """Line numbers and cleaned docstrings of a module, its classes and functions, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        stack: list[ast.stmt | ast.Module] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node, clean=False):
                yield node.body[0].lineno, inspect.cleandoc(text)
            stack.extend(reversed(node.body))
