"""Fields of a request's JSON: what each may be, and a 400 that names the one at fault.

A field that is null is one that was not given: clients send back whole objects.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from sepjax.config import nearest
from sepjax.config.checks import once
from sepjax.serve.errors import ApiError

_SHOWN = 80  # characters of a wrong value that an error repeats

_JSON = "no answer is held to a form, so ask for JSON in the messages, and check what comes"
# What serves the purpose of a field that is refused.
INSTEAD = {
    "response_format": _JSON, "structured_outputs": _JSON, "guided_json": _JSON, "functions": "tools has them",
    "function_call": "tool_choice says that of tools", "chat_template": "the model's own is used",
    "reasoning_effort": "what the model's template knows of that goes into chat_template_kwargs",
    "echo": "tokens of the prompt come from /tokenize", "best_of": "n makes as many answers",
}  # fmt: skip

Check = Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class Field:
    """One that is understood."""

    check: Check  # (name, value) -> the value to use; raises ApiError
    default: Any = None  # where it is not given


def wrong(name: str, value: Any, expected: str) -> ApiError:
    """A 400: the field has a value that it cannot have."""
    try:
        shown = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        shown = str(type(value).__name__)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return ApiError(400, f"{name}={shown} must be {expected}", param=name, code="invalid_value")


def strict_json(source: bytes | str) -> Any:
    """What JSON says; raises ValueError for what is none (NaN is not), for numbers that are infinite as floats (1e999)
    and for a name that an object has twice, RecursionError where it is too deep.
    """

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    def finite(digits: str) -> float:
        if math.isinf(found := float(digits)):
            raise ValueError(f"{digits[:_SHOWN]} is larger than any float")
        return found

    return json.loads(source, parse_constant=no_number, parse_float=finite, object_pairs_hook=once)


def number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    """A finite number from `low` to `high`; `above`: not `low` itself."""
    top = "" if high == math.inf else f" and at most {high:g}"
    expected = f"a number {'above' if above else 'of at least'} {low:g}{top}"

    def check(name: str, value: Any) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not low <= value <= high or (above and value == low) or abs(value) > 3e38:
            raise wrong(name, value, expected)
        return float(value)

    return check


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""

    def check(name: str, value: Any) -> int:
        if type(value) is float and value.is_integer():  # JSON does not tell 3.0 from 3
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise wrong(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def flag(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """An object of whatever it holds."""
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    return value


def texts(most: int) -> Check:
    """A string or up to `most` of them, none of them empty: a tuple."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > most or not all(isinstance(x, str) and x for x in found):
            raise wrong(name, value, f"a string or a list of up to {most} strings, none of them empty")
        return tuple(found)

    return check


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A list of token ids; whether there are such tokens, the model knows."""
    fits = isinstance(value, list) and set(map(type, value)) <= {int}  # true is no whole number here
    if not fits or (value and not 0 <= min(value) <= max(value) < 2**31):
        raise wrong(name, value, "a list of token ids")
    return tuple(value)


def biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """{"token id": bias from -100 to 100}: pairs."""
    if not isinstance(value, dict):
        raise wrong(name, value, "an object of token ids and biases from -100 to 100")
    bias = number(-100.0, 100.0)
    found = []
    for key, x in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10) or int(key) >= 2**31:
            raise wrong(f"{name}.{key[:_SHOWN]}", x, "under a token id")
        found.append((int(key), bias(f"{name}.{key}", x)))
    return tuple(found)


def read(
    body: Any, known: Mapping[str, Field], refused: Mapping[str, tuple[Any, ...] | None], where: str = ""
) -> dict[str, Any]:
    """The values of all fields that are known.

    Args:
      body: JSON as Python reads it.
      known: fields by name.
      refused: what the protocol has and this server does not do: name -> the values that ask for nothing beside [] and
        {}; None: whatever is there asks for something.
      where: names what `body` is a part of.

    Raises:
      ApiError: 400, for the first field that is wrong, refused or unknown.
    """
    if not isinstance(body, dict):
        error = wrong(where.rstrip(".") or "the request", body, "a JSON object")
        error.param = where.rstrip(".") or None
        raise error
    for name, value in body.items():
        if name in known or value is None:
            continue
        nothing = refused.get(name)
        if nothing is not None and (value in nothing or value in ([], {})):
            continue
        what = f"{where}{name[:_SHOWN]}"
        if name in refused:
            asks, or_idle = json.dumps(value)[:_SHOWN], f", or give {json.dumps(nothing[0])}" if nothing else ""
            instead = f": {INSTEAD[name]}" if name in INSTEAD else ""
            message = f"{what}={asks} is not supported by this server; leave it out{or_idle}{instead}"
            raise ApiError(400, message, param=what, code="unsupported")
        meant = nearest(name[:_SHOWN], list(known))
        raise ApiError(400, f"unknown field {what!r}{meant}", param=what, code="unknown_field")
    given = {name: value for name, value in body.items() if name in known and value is not None}
    return {
        name: field.check(f"{where}{name}", given[name]) if name in given else field.default
        for name, field in known.items()
    }
