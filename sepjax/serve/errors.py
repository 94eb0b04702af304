"""What a client is told when something is wrong, in OpenAI's form."""

import contextlib
from collections.abc import Iterator
from typing import Any

from sepjax.config import UserError

_TYPES = {
    401: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


def _sendable(text: str) -> str:
    """With question marks for halves of surrogate pairs, which JSON can name and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


class ApiError(Exception):
    """A request that is not answered: its status, and what the JSON says of it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ):
        """`param`: the field at fault; `retry_after`: seconds, 0: the header is left out."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        param = None if self.param is None else _sendable(self.param)
        return {"error": {"message": _sendable(self.message), "type": kind, "param": param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What goes beside it."""
        found = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refused(error: UserError, param: str | None = None) -> ApiError:
    """A mistake in a request that the model's own code found; `param`: in which of its fields."""
    return ApiError(400, str(error), param=param, code="invalid_value")


@contextlib.contextmanager
def naming(param: str) -> Iterator[None]:
    """Inside, what the model's own code refuses is the fault of this field."""
    try:
        yield
    except UserError as error:
        raise refused(error, param) from error
