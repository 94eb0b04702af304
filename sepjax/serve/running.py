"""A server as a process: its socket, its signals, and how it ends.

The socket listens from the first moment; until the model is there, all is answered with 503. SIGTERM or Ctrl-C: nothing
new is taken on, what runs may finish for a while, then all is saved. A second one ends it at once.
"""

import dataclasses
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from sepjax import interrupt
from sepjax.config import UserError
from sepjax.serve.app import Limits, create_app
from sepjax.serve.conversations import Conversations
from sepjax.serve.fronts import Fronts
from sepjax.serve.http import server_of
from sepjax.serve.metrics import Metrics
from sepjax.serve.served import Served
from sepjax.serve.state import StateFolder, TakenFolder
from sepjax.serve.worker import Worker

log = logging.getLogger("sepjax.serve")
_PATIENCE = 2.0  # seconds that a worker may take to end after an error of its own
_IDLE_CONNECTIONS = 1024  # beyond those that are answered


class ServeError(UserError):
    """A server that cannot begin."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a server runs."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any that is free
    rows: int = 8
    max_waiting: int = 256
    limits: Limits = dataclasses.field(default_factory=Limits)
    api_key: str = ""
    drain_seconds: float = 30.0
    cache_memory: int = 4 << 30  # bytes of the host's memory for conversations; 0: none is kept
    # Bytes of the device's memory for those that go on soon, beyond `cache_memory`; None: half of what is left of it
    # beside the model and the slots, which of a processor's is none.
    device_memory: int | None = None
    # Tokens of an answer that the device may make before the host looks at them; None: as suits it (`steps_of`).
    steps: int | None = None
    state: str | None = None  # folder that keeps them; None: they go with the process
    state_bytes: int = 16 << 30  # of its files
    http_processes: int = 0  # that answer HTTP (`sepjax.serve.fronts`); 0: a thread of this one
    log_level: str | None = None  # of those processes; None: they say nothing


class Running:
    """One server. `run` is a whole process; `with Running(...)` serves from a thread of this one, until the end."""

    def __init__(self, load: Callable[[], Served], options: Options):
        """Takes the address, and the folder of `state`; raises ServeError or StateError where that cannot be.

        Args:
          load: makes the model, in the worker's thread.
          options: how it runs.
        """
        self._options, self.metrics = options, Metrics()
        self._socket = _listen(options.host, options.port)
        self._state: StateFolder | TakenFolder | None = None
        try:
            self._state = None if options.state is None else TakenFolder(options.state)
        except BaseException:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        self.worker = Worker(
            load, self._conversations, rows=options.rows, max_waiting=options.max_waiting, metrics=self.metrics,
            steps=options.steps, at_end=self._exit,
        )  # fmt: skip
        self.metrics.watch(self.worker)
        connections = options.rows + options.max_waiting + _IDLE_CONNECTIONS
        how = {
            "limits": dataclasses.asdict(options.limits), "api_key": options.api_key, "connections": connections,
            "log_level": options.log_level,
        }  # fmt: skip
        self._fronts, self._server = None, None
        if options.http_processes:
            self._fronts = Fronts(self.worker, self._socket, options.http_processes, how)
            self.worker.at_ready, self.worker.at_stop = self._fronts.told, self._fronts.stopping
        else:
            self.app = create_app(self.worker, options.limits, api_key=options.api_key)
            self._server = server_of(self.app, connections)

    @property
    def url(self) -> str:
        """Where it is."""
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serves until a signal comes. Raises what ended it, if that is an error."""
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = {kind: signal.signal(kind, self._on_signal) for kind in kinds}
        try:
            self._begin()
            log.info("listening", extra={"url": self.url})
            self._answer()
        finally:
            self.worker.stop(0.0)
            self._join()
            for kind, handler in before.items():
                signal.signal(kind, handler)
        log.info("ended")
        if self.worker.error is not None:
            raise self.worker.error

    def _begin(self) -> None:
        if self._fronts is not None:
            self._fronts.start()
        self.worker.start()

    def _answer(self) -> None:
        """Until the end."""
        if self._server is not None:
            self._server.run(sockets=[self._socket])
        else:
            self._loaded()
            if self.worker.error is None:
                log.info("processes that answer HTTP are there", extra={"processes": self._options.http_processes})
            self._join()
            self._socket.close()

    def _join(self) -> None:
        """Waits for the worker. What it begins is not waited for where an error has come from elsewhere meanwhile: that
        may take minutes, and nothing can interrupt it.
        """
        if self.worker.served is None and self.worker.error is not None and not self.worker.join(_PATIENCE):
            interrupt.need_not_wait_for(lambda: self.worker.join(0.0))
            self._exit()
        else:
            self.worker.join()

    def _loaded(self) -> None:
        """Waits until it answers requests, or what keeps it from doing so is the worker's error."""
        while self.worker.served is None and self.worker.error is None:
            time.sleep(0.005)
        if self._fronts is not None:
            self._fronts.wait()

    def start(self) -> None:
        """Listens and loads, in threads of this process."""
        self._begin()
        self._thread = threading.Thread(target=self._answer, name="http", daemon=True)
        self._thread.start()
        while self._server is not None and not self._server.started and self._thread.is_alive():
            time.sleep(0.005)

    def wait(self) -> None:
        """Until it answers requests; raises what kept it from doing so."""
        self._loaded()
        if self.worker.error is not None:
            self._thread.join()
            raise self.worker.error

    def stop(self, seconds: float) -> None:
        """Takes nothing on any more; what runs may take so long to finish. Returns when all has ended."""
        self.worker.stop(seconds)
        self.worker.join()
        self._thread.join()

    def __enter__(self) -> "Running":
        self.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(self._options.drain_seconds)

    def _conversations(self, served: Served) -> Conversations:
        """What keeps them; in the worker's thread, once the model is there."""
        options, need = self._options, served.row_bytes
        if 0 < options.cache_memory < 2 * need:
            raise ServeError(
                f"--cache_memory is {options.cache_memory} bytes, no room for two conversations of {need}; give "
                f"{-(-2 * need >> 20)} MiB or more, or 0 to keep none"
            )
        state = None
        if isinstance(self._state, TakenFolder):
            state = self._state = StateFolder(self._state, served, options.state_bytes)
        if not options.cache_memory:
            return Conversations(served.tokenizer, 0, state)
        on_device = _room(options.rows * need) if options.device_memory is None else options.device_memory
        return Conversations(served.tokenizer, options.cache_memory, state, on_device)

    def _exit(self) -> None:
        state, self._state = self._state, None  # it may be called by two threads
        if state is not None:
            state.close()
        if self._server is not None:
            self._server.should_exit = True
        if self._fronts is not None:
            self._fronts.close()

    def _on_signal(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self.worker.is_stopping or self.worker.served is None:  # a second time, or nothing has begun yet
            log.info("ended at once", extra={"signal": name})
            os._exit(
                128 + number if self.worker.is_stopping else 0
            )  # no thread can be interrupted, and files are whole
        self.worker.stop(self._options.drain_seconds)
        log.info("stopping", extra={"signal": name, "running": self.worker.num_running})


def _room(slots: int) -> int:
    """Half of what an accelerator has left beside slots of so many bytes, which programs may need twice."""
    stats = jax.local_devices()[0].memory_stats() or {}
    left = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) - 2 * slots
    return max(0, left) // 2


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
