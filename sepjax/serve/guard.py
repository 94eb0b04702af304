"""Who may ask: whoever bears the key; without a key, whoever asks from this machine for this machine.

A web page in a browser on this machine can send requests to 127.0.0.1 too, under a name of its own that leads there.
So without a key the request must name this machine.
"""

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sepjax.serve.errors import ApiError

LOCAL = ("127.0.0.1", "localhost", "[::1]")
_GUARDED = ("/v1/", "/metrics", "/tokenize", "/detokenize")  # the page is for everybody, and asks with a key


class Guard:
    """An application in front of another one."""

    def __init__(self, app: ASGIApp, api_key: str = ""):
        self._app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 or 403 itself, and passes on all else."""
        if scope["type"] == "http":
            error = self._refusal(scope["path"], Headers(scope=scope))
            if error is not None:
                await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
                return
        elif scope["type"] != "lifespan":
            return  # a web socket: uvicorn closes what nobody accepts
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if not self._key:
            host = headers.get("host", "localhost")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name.lower() in LOCAL:
                return None
            return ApiError(403, f"requests without a key must be for {' or '.join(LOCAL)}, got Host: {host[:80]}")
        if not path.startswith(_GUARDED):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            return None
        return ApiError(401, "a wrong or missing API key; expected the header Authorization: Bearer KEY",
                        code="invalid_api_key")  # fmt: skip
