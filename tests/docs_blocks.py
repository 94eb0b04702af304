"""The fenced blocks of a Markdown page, the commands in them, and what their Python means: for test_docs.py."""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_FENCE = re.compile(
    r"(?P<mark><!--[^\n]*-->\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_NEEDS = re.compile(r"<!-- needs: (.+) -->")
_ASSIGNMENT = re.compile(r"\w+=")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block."""

    line: int
    language: str
    text: str
    needs: str  # what the comment before it says; "": nothing


def blocks(page: str) -> list[Block]:
    """All of a page. Raises `ValueError` for a comment before one that says nothing which is understood."""
    found = []
    for match in _FENCE.finditer(page):
        needs = _NEEDS.match(match["mark"] or "")
        if match["mark"] and not needs:
            raise ValueError(f"{match['mark'].strip()}: expected <!-- needs: WHAT -->")
        line = page[: match.start("text")].count("\n") + 1
        found.append(Block(line, match["language"], match["text"], needs[1] if needs else ""))
    return found


def commands(script: str, known: dict[str, str] | None = None) -> Iterator[list[str]]:
    """The words of every command of a shell script, its own variables put in and comments left out.

    known: variables and what they stand for, to which the script's own are added.
    """
    known = {} if known is None else known
    script = re.sub(r"\\\n", " ", script)
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if token not in (";", "&&", "|"):
                value = re.sub(r"\$(\w+)", lambda name: known.get(name[1], name[0]), token)
                words += shlex.split(value) if re.fullmatch(r"\$\w+", token) else [value]
                continue
            while words and _ASSIGNMENT.match(words[0]):
                name, _, value = words.pop(0).partition("=")
                known[name] = value
            if words:
                yield words
            words = []


class Namespace:
    """What names of a page's Python stand for, as far as sepjax is concerned, without running it."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {"sepjax": importlib.import_module("sepjax")}  # name -> object
        self._types: dict[str, Any] = {}  # name of a variable -> its class

    def problems(self, code: str) -> list[str]:
        """What does not exist, or cannot be called so. Raises `SyntaxError`."""
        found: list[str] = []
        for node in _in_order(ast.parse(code)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found += self._imported(node)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                self._assigned(node.targets[0], self._result(node.value.func))
            elif isinstance(node, ast.Attribute):
                owner = self._owner(node.value)
                if owner is not None and not _has(owner, node.attr):
                    found.append(f"{ast.unparse(node)} does not exist")
            elif isinstance(node, ast.Call):
                found += self._called(node)
        return found

    def _imported(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        found = []
        for alias in node.names:
            path = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
            if path.split(".")[0] != "sepjax":
                self._known.pop(alias.asname or alias.name, None)
                continue
            try:
                value = _at(path)
            except (ImportError, AttributeError):
                found.append(f"{path} does not exist")
                continue
            if isinstance(node, ast.Import) and not alias.asname:
                self._known["sepjax"] = importlib.import_module("sepjax")
            else:
                self._known[alias.asname or alias.name] = value
        return found

    def _assigned(self, target: ast.expr, result: Any) -> None:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        types = typing.get_args(result) if isinstance(target, ast.Tuple) else [result]
        for name, kind in zip(names, [*types, *[None] * len(names)], strict=False):
            if isinstance(name, ast.Name):
                self._known.pop(name.id, None)
                self._types.pop(name.id, None)
                if inspect.isclass(kind):
                    self._types[name.id] = kind

    def _owner(self, node: ast.expr) -> Any:
        """The object or class that an expression stands for; None: not known."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id, self._types.get(node.id))
        if isinstance(node, ast.Call):
            return self._result(node.func)
        if isinstance(node, ast.Attribute):
            owner = self._owner(node.value)
            found = getattr(owner, node.attr, None) if owner is not None else None
            return found if isinstance(found, ModuleType) or callable(found) else None
        return None

    def _result(self, function: ast.expr) -> Any:
        called = self._owner(function)
        if called is None or inspect.isclass(called):
            return called
        try:
            return typing.get_type_hints(called).get("return")
        except (NameError, TypeError):
            return None

    def _called(self, node: ast.Call) -> list[str]:
        called = self._owner(node.func)
        if not callable(called) or isinstance(node.func, ast.Call):
            return []
        try:
            signature = inspect.signature(called)
        except (TypeError, ValueError):
            return []
        if any(isinstance(x, ast.Starred) for x in node.args) or any(x.arg is None for x in node.keywords):
            return []
        is_method = isinstance(node.func, ast.Attribute) and inspect.isclass(self._owner(node.func.value))
        first = [None] if is_method and inspect.isfunction(called) else []
        try:
            signature.bind(*first, *node.args, **{str(x.arg): x.value for x in node.keywords})
        except TypeError as error:
            return [f"{ast.unparse(node)}: {error}"]
        return []


def _in_order(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes as they run: what is assigned is read first."""
    for child in ast.iter_child_nodes(tree):
        yield from _in_order(child)
    yield tree


def _at(path: str) -> Any:
    """The module or attribute at a dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _has(owner: Any, name: str) -> bool:
    if hasattr(owner, name) or name in getattr(owner, "__annotations__", {}):
        return True
    if isinstance(owner, ModuleType):
        try:
            importlib.import_module(f"{owner.__name__}.{name}")
        except ImportError:
            return False
        return True
    # Set by __init__, or of a class that makes its attributes as it likes.
    return f"self.{name}" in inspect.getsource(owner) if inspect.isclass(owner) else False
