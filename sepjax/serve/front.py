"""A process that answers HTTP for the one that has the device: `python -m sepjax.serve.front SOCKET LISTENING`.

Both are numbers of files that it inherits: its end of a socket pair (`sepjax.serve.wire`), and the socket that clients
connect to. It reads and tokenizes requests, writes answers, and ends when the other side does. It touches no device.
"""

import asyncio
import contextlib
import itertools
import json
import signal
import socket
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import uvicorn

from sepjax.clocks import Clocks
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.chat_template import ChatTemplate
from sepjax.serve import logs, process, wire
from sepjax.serve.app import Limits, create_app
from sepjax.serve.conversations import Conversations
from sepjax.serve.errors import ApiError
from sepjax.serve.http import server_of
from sepjax.serve.jobs import Inbox, Job, tokens_of
from sepjax.serve.served import Served

_TOLD = 64  # tokens that an inbox has given before the other side hears of it


class DistantWorker:
    """What the application asks of a `Worker`, which is in another process. All in the event loop."""

    conversations: Conversations | None = None  # what they hold is looked for where they are

    def __init__(self, connection: socket.socket):
        """`connection`: this process's end."""
        self._socket = connection
        self._served: Served | None = None
        self._is_stopping = self._has_ended = False
        self._numbers = itertools.count()
        self._inboxes: weakref.WeakValueDictionary[int, _Inbox] = weakref.WeakValueDictionary()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self.clocks = Clocks()

    # -- for the application ------------------------------------------------------------------------------------------

    def ready(self) -> Served:
        """As `Worker.ready`."""
        if self._is_stopping:
            raise _stopping()
        if self._served is None:
            raise ApiError(503, "the model is being loaded", code="loading", retry_after=5)
        return self._served

    def check_room(self, choices: int) -> None:
        """Whether it answers at all; how many there are is known where they are, and told by the first item."""
        self.ready()

    def inbox(self) -> Inbox:
        """A new one, for one request."""
        number = next(self._numbers)
        found = self._inboxes[number] = _Inbox(self, number)
        return found

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands them over; what speaks against it comes as an item."""
        self.ready()
        inbox: Any = jobs[0].inbox
        self.send(wire.told_jobs(inbox.number, jobs))

    def cancel(self, inbox: Inbox) -> None:
        """As `Worker.cancel`."""
        self._tell("cancel", inbox)

    def caught_up(self, inbox: Inbox) -> None:
        """As `Worker.caught_up`."""
        self._tell("caught_up", inbox)

    async def metrics(self) -> bytes:
        """What /metrics tells."""
        return (await self._call("metrics")).encode()

    async def view(self, name: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """`sepjax.serve.view.find`."""
        return await self._call("view", name, dict(asked))

    async def _call(self, name: str, *arguments: Any) -> Any:
        if self._has_ended:  # nobody would answer
            raise _stopping()
        number = next(self._numbers)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self.send(wire.frame({"call": number, "name": name, "arguments": arguments}))
            return await future
        finally:
            del self._calls[number]

    def _tell(self, what: str, inbox: Any) -> None:
        self.send(wire.frame({what: inbox.number}))

    def send(self, data: bytes) -> None:
        """A frame. What comes is small: nobody waits for the other side to read it."""
        if self._writer is not None:
            self._writer.write(data)

    # -- what comes ---------------------------------------------------------------------------------------------------

    async def begun(self) -> dict[str, Any]:
        """Connects, and waits for what this process is told first."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        return (await self._next())["begin"]

    async def read(self) -> None:
        """Takes what comes, until the other side ends."""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                self._take(await self._next())
        self._is_stopping = self._has_ended = True
        for future in [future for future in self._calls.values() if not future.done()]:
            future.set_exception(_stopping())

    async def _next(self) -> dict[str, Any]:
        size, rest = wire.HEAD.unpack(await self._reader.readexactly(wire.HEAD.size))
        return json.loads((await self._reader.readexactly(size + rest))[:size])

    def _take(self, said: dict[str, Any]) -> None:
        if "items" in said:
            for number, its in said["items"]:
                if (inbox := self._inboxes.get(number)) is not None:
                    inbox.put([wire.item_of(told) for told in its])
        elif "call" in said:
            future = self._calls.get(said["call"])
            if future is not None and not future.done():
                error = said.get("error")
                future.set_result(said["found"]) if error is None else future.set_exception(wire.error_of(error))
        elif "ready" in said:
            tokenizer = Tokenizer.load(said["folder"])
            template = None if said["template"] is None else ChatTemplate.of_key(said["template"])
            self._served = Served.of_told(said["ready"], tokenizer, template)
            self.send(wire.frame({"up": True}))
        else:
            self._is_stopping = True


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", retry_after=5)


class _Inbox(Inbox):
    """One that tells the other side, now and then, how much was taken out of it."""

    def __init__(self, worker: DistantWorker, number: int):
        super().__init__(asyncio.get_running_loop())
        self.number, self._worker, self._untold = number, worker, 0

    async def take(self) -> list[tuple[int, Any]]:
        """(choice, item) of all that has come, one at least."""
        found = await super().take()
        self._untold += tokens_of(found)
        if self._untold >= _TOLD:
            self._worker.send(wire.frame({"read": self.number, "tokens": self._untold}))
            self._untold = 0
        return found


async def begin(connection: socket.socket, listening: socket.socket) -> None:
    """Answers until the other side ends."""
    worker = DistantWorker(connection)
    how = await worker.begun()
    if how["log_level"] is not None:
        logs.begin(how["log_level"])
    app = create_app(worker, Limits(**how["limits"]), api_key=how["api_key"])
    server = server_of(app, how["connections"])
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await worker.read()
    server.should_exit = True
    await serving


def main() -> None:
    """The process."""
    for kind in (signal.SIGINT, signal.SIGTERM):  # meant for the other process, which ends this one
        signal.signal(kind, signal.SIG_IGN)
    process.prepare()
    connection, listening = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    loop = uvicorn.Config("", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(begin(connection, listening))


if __name__ == "__main__":
    main()
