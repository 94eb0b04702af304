"""Processes that answer HTTP, seen from the one that has the device.

Python runs one thread of a process at a time. Reading requests, writing chunks, templates and tokenizers take some four
milliseconds a request, in which the threads that step the slots and ask the device would wait: so they are elsewhere
(`sepjax.serve.front`), and what comes here are token ids, and what goes there are tokens and their texts.

    front processes          all accept connections on one socket
      | ^   frames over a socket pair each (`sepjax.serve.wire`)
      v |
    Link                     a thread that reads: jobs for the worker; one that writes: what its outbox has
"""

import contextlib
import json
import logging
import queue
import socket
import struct
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from sepjax import children
from sepjax.config import UserError
from sepjax.serve import wire
from sepjax.serve.errors import ApiError
from sepjax.serve.jobs import Failed, Inbox
from sepjax.serve.served import Served

if TYPE_CHECKING:
    from sepjax.serve.worker import Worker

log = logging.getLogger("sepjax.serve")
_STARTS = 120.0  # seconds that a process may take to begin, once the model is there
_PATIENCE = 15.0  # and to end once it was told to


class Fronts:
    """All of them: `start`, then `told` once the model is there, `stopping`, `close`."""

    def __init__(self, worker: "Worker", listening: socket.socket, number: int, how: dict[str, Any]):
        """Starts nothing yet.

        Args:
          worker: answers.
          listening: what they accept connections on.
          number: of processes.
          how: they answer (`sepjax.serve.front.begin`); JSON.
        """
        self._worker, self._listening, self._number, self._how = worker, listening, number, how
        self._links: list[Link] = []
        self._lock = threading.Lock()
        self._ready: bytes | None = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self.is_closing = False

    def start(self) -> None:
        """Begins the processes, which say that the model is being loaded. Raises OSError where one cannot be begun."""
        try:
            for _ in range(self._number):
                self._links.append(Link(self, self._worker, self._listening, self._how))
        except OSError:
            self.close()
            raise

    def told(self, served: Served) -> None:
        """The model is there: has all of them tokenize for it."""
        folder = self._folder = tempfile.TemporaryDirectory(prefix="sepjax-serve-")
        served.tokenizer.save(folder.name)
        template = None if served.template is None else served.template.key
        said = {"ready": served.told(), "folder": folder.name, "template": template}
        for link in self._links:
            link.send(wire.frame(said))

    def wait(self) -> None:
        """Until all of them have it, or one has ended. One that is not there in time ends the server."""
        until = time.monotonic() + _STARTS
        for link in self._links:
            while self._worker.error is None and not link.is_up.wait(0.1):
                if time.monotonic() > until:
                    said = f"a process that answers HTTP ({link.process.pid}) has not begun within {_STARTS:g} seconds"
                    self._worker.fail(FrontError(said))
        if all(link.is_up.is_set() for link in self._links):
            self._remove_folder()  # all have read it; a server that is killed leaves none behind

    def stopping(self) -> None:
        """From here on they refuse."""
        for link in self._links:
            link.send(wire.frame({"stopping": True}))

    def ended(self, link: "Link") -> None:
        """A process has ended."""
        if not self.is_closing:
            code = link.end_of_process(1.0)  # it is not heard any more
            self._worker.fail(FrontError(f"a process that answers HTTP has ended ({code}); the server ends with it"))

    def close(self) -> None:
        """What was sent reaches them, then they end; waits for that."""
        self.is_closing = True
        for link in self._links:
            link.close()
        for link in self._links:
            link.join(_PATIENCE)
        self._remove_folder()

    def _remove_folder(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()


class FrontError(UserError):
    """A process that answers HTTP is gone: what it said of that is above the message."""


class DistantInbox(Inbox):
    """An inbox that is in another process: what is put into it goes there. `taken` is what that has told of.

    Attributes:
      is_left: nobody reads it any more, which may be known before its jobs have reached the worker.
    """

    def __init__(self, link: "Link", number: int):
        super().__init__(link)
        self.number, self.is_left = number, False


class Link:
    """One process, and the two threads that read from it and write to it."""

    def __init__(self, fronts: Fronts, worker: "Worker", listening: socket.socket, how: dict[str, Any]):
        """Starts it."""
        self._fronts, self._worker = fronts, worker
        self._socket, theirs = socket.socketpair()
        fds = theirs.fileno(), listening.fileno()
        # In a session of its own: Ctrl-C is not meant for it. It ends when this process does, or says so.
        # The device is this process's.
        environment = children.environment() | {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        command = [*children.command("sepjax.serve.front"), *map(str, fds)]
        try:
            self.process = subprocess.Popen(
                command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self.is_up = threading.Event()
        self._inboxes: weakref.WeakValueDictionary[int, DistantInbox] = weakref.WeakValueDictionary()
        self._out: queue.SimpleQueue[Callable[[], bytes] | None] = queue.SimpleQueue()
        self._calls = ThreadPoolExecutor(2, "calls")
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._read, "from http"), (self._write, "to http"))
        ]
        for thread in self._threads:
            thread.start()
        self.send(wire.frame({"begin": how}))

    def send(self, data: bytes) -> None:
        """A frame, after those before."""
        self._out.put(lambda: data)

    def call_soon_threadsafe(self, callback: Any, *args: Any) -> None:
        """As an event loop has it, for the worker's outbox: hands items over to inboxes that are there."""
        (found,) = args
        self._out.put(lambda: _told_items(found))

    def close(self) -> None:
        """Nothing comes after what was sent."""
        self._out.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the end of the process, and makes it end if it does not."""
        self.end_of_process(seconds)
        for thread in self._threads:
            thread.join()
        self._calls.shutdown(wait=False)
        self._socket.close()

    def end_of_process(self, seconds: float) -> int:
        """Its code. Waits for it so long, then makes it end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _write(self) -> None:
        try:
            while (make := self._out.get()) is not None:
                self._socket.sendall(make())
        except OSError:  # it is gone, which the other thread finds
            pass
        except Exception:
            log.exception("a process that answers HTTP cannot be told what it is to answer")
        with contextlib.suppress(OSError):  # it ends, whatever came before: nobody would be answered there any more
            self._socket.shutdown(socket.SHUT_WR)

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as file:
                while head := file.read(wire.HEAD.size):
                    size, rest = wire.HEAD.unpack(head)
                    said = json.loads(file.read(size))
                    with self._worker.clocks("from http"):
                        self._take(said, file.read(rest) if rest else b"")
        except (OSError, ValueError, struct.error):
            log.debug("a process that answers HTTP broke off")
        except Exception:
            log.exception("what a process that answers HTTP said was not understood")
        for inbox in list(self._inboxes.values()):
            self._leave(inbox)
        self.is_up.set()
        self._fronts.ended(self)

    def _take(self, said: dict[str, Any], rest: bytes) -> None:
        if "jobs" in said:
            self._submit(said, rest)
        elif "read" in said:
            if (inbox := self._inboxes.get(said["read"])) is not None:
                inbox.taken += said["tokens"]
        elif "cancel" in said:
            if (inbox := self._inboxes.get(said["cancel"])) is not None:
                self._leave(inbox)
        elif "caught_up" in said:
            if (inbox := self._inboxes.get(said["caught_up"])) is not None:
                self._worker.caught_up(inbox)
        elif "call" in said:
            self._calls.submit(self._answer, said["call"], said["name"], said["arguments"])
        else:
            self.is_up.set()

    def _submit(self, said: dict[str, Any], rest: bytes) -> None:
        number: int = said["jobs"]
        inbox = self._inboxes[number] = DistantInbox(self, number)
        jobs = wire.jobs_of(said, rest, inbox)
        kept = self._worker.conversations
        if kept is not None and kept.has_disk:
            self._calls.submit(self._warm_and_submit, jobs)
        else:
            self._begin(jobs)

    def _leave(self, inbox: DistantInbox) -> None:
        inbox.is_left = True
        self._worker.cancel(inbox)

    def _warm_and_submit(self, jobs: list) -> None:
        try:
            for job in {id(job.ids): job for job in jobs}.values():
                self._worker.conversations.warm(job.ids, job.blocks)  # pyright: ignore[reportOptionalMemberAccess]
        except Exception:
            log.exception("saved conversations were not looked for")  # the request is read from its beginning
        self._begin(jobs)

    def _begin(self, jobs: list) -> None:
        inbox: DistantInbox = jobs[0].inbox
        try:
            self._worker.submit(jobs)
        except ApiError as error:
            self.call_soon_threadsafe(None, [(inbox, [(jobs[0].choice, Failed(error))])])
        if inbox.is_left:  # before the worker knew of them
            self._worker.cancel(inbox)

    def _answer(self, number: int, name: str, arguments: list) -> None:
        try:
            found: Any = self._worker.tell() if name == "metrics" else self._worker.find_view(*arguments)
            said = wire.frame({"call": number, "found": found})
        except ApiError as error:
            said = wire.frame({"call": number, "error": wire.told_error(error)})
        except Exception:
            log.exception("a question was not answered")
            said = wire.frame({"call": number, "error": wire.told_error(ApiError(500, "internal error"))})
        self.send(said)


def _told_items(found: list[tuple[DistantInbox, list]]) -> bytes:
    items = [[inbox.number, [wire.told_item(*pair) for pair in its]] for inbox, its in found]
    return wire.frame({"items": items})
