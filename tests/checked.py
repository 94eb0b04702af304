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
            from beartype import beartype

            checked = beartype(function)
        return checked(*args, **kwargs)

    return late
