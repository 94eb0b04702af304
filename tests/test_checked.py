"""The type checks of tests, themselves."""

from typing import Any

import pytest
from beartype.roar import BeartypeCallHintViolation

from tests.checked import when_called


def nested(kind: Any) -> Any:
    def one(x: Any) -> None:
        pass

    one.__annotations__["x"] = kind
    return when_called(one)


def test_copies_of_a_nested_function_are_checked_by_their_own_types():
    nested(int)(1)
    nested(str)("a")
    for kind, wrong in ((int, "a"), (str, 1), (str, 1), (int, "a")):
        with pytest.raises(BeartypeCallHintViolation):
            nested(kind)(wrong)
