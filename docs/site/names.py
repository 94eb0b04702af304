"""Docstrings whose parameters share a line, as the tool that reads them wants it: each named by itself."""

import re
from typing import Any

import griffe

_TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): (.*)$", re.MULTILINE)


class NamesApart(griffe.Extension):
    """`stop, stop_token_ids: texts that end it` becomes a line of each name: the text, and where it stands."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called for every function that was read."""
        if func.docstring is None:
            return
        known = {parameter.name for parameter in func.parameters}

        def apart(match: re.Match[str]) -> str:
            space, names, text = match.groups()
            first, *others = names.split(", ")
            if not {first, *others} <= known:
                return match[0]
            return "\n".join([*(f"{space}{name}: see `{others[-1]}`." for name in (first, *others[:-1])),
                              f"{space}{others[-1]}: (of {names} alike) {text}"])  # fmt: skip

        func.docstring.value = _TOGETHER.sub(apart, func.docstring.value)
