"""How HTTP is answered, in whichever process."""

import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn

GRACE = 5  # seconds for what has been answered to reach its clients, once the worker has ended
_MOST_HEADERS = 64 << 10  # bytes


def server_of(app: Any, connections: int) -> "Quiet":
    """A server of an application; `connections`: at the same time, at most."""
    config: Any = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, ws="none", lifespan="off", proxy_headers=False,
        http="h11", h11_max_incomplete_event_size=_MOST_HEADERS, timeout_graceful_shutdown=GRACE,
        limit_concurrency=connections,
    )  # fmt: skip
    return Quiet(config)


class Quiet(uvicorn.Server):
    """Leaves signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing."""
        yield
