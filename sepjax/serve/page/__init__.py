"""The page at /: files beside this one, as they are, under a policy that lets nothing else in.

    index.html  style.css    what is there, and how it looks
    page.js                  the parts put together: sending, stopping, conversations
    conversation.js store.js one talk's messages on the screen; what the browser keeps
    api.js                   requests, and answers as they come
    markdown.js render.js    text to a tree (no browser needed), the tree to elements: never by way of HTML
    cache.js                 the gauge, and the text with what the cache holds of it

No build step, nothing from elsewhere. What a model writes becomes text nodes; the policy would stop it if it did not.
"""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_FOLDER = Path(__file__).parent
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # no string ever becomes HTML, by mistake or otherwise
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again each time: another version of the server, another page
}


def routes() -> list[BaseRoute]:
    """GET / and GET /page/NAME."""
    files = {path.name: path for path in _FOLDER.iterdir() if path.suffix in _KINDS}
    return [
        Route("/", _answer(files.pop("index.html"))),
        *(Route(f"/page/{name}", _answer(path)) for name, path in sorted(files.items())),
    ]


def _answer(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """A file, read once."""
    data, kind = path.read_bytes(), f"{_KINDS[path.suffix]}; charset=utf-8"
    tag = f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"'
    headers = HEADERS | {"ETag": tag}

    async def answer(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers | {"Content-Type": kind})

    return answer
