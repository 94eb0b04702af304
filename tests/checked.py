"""Beartype, at a function's first call.

A worker imports all of sepjax and calls half of its three thousand functions. Each takes two milliseconds to wrap, once
for its arguments and once for its result.
"""

import sys
from collections.abc import Callable
from typing import Any


def when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype(function)`, made when it is first called."""
    checked: Callable[..., Any] | None = None

    def late(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checked
        if checked is None and sys.is_finalizing():  # of what is only now forgotten, when nothing can be imported
            return function(*args, **kwargs)
        if checked is None:
            checked = _checked(function)
        return checked(*args, **kwargs)

    return late


_NESTED: dict[tuple[Any, ...], tuple[dict[str, Any], Callable[..., Any]]] = {}


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Functions within functions are made anew at each call of the outer one: while their types are the same, so is
    the check, which calls nothing of theirs."""
    from beartype import beartype

    if "<locals>" not in function.__qualname__:
        return beartype(function)
    key = function.__module__, function.__qualname__, function.__code__.co_varnames
    types, checked = _NESTED.get(key, (None, None))
    if checked is None or types != function.__annotations__:
        checked = beartype(function)
        _NESTED[key] = function.__annotations__, checked
    return checked
