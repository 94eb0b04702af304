"""The side of `sepjax.hub.template_worker` in this process: starts it once, asks it, and reports how it ended."""

import atexit
import functools
import importlib.util
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepjax import children
from sepjax.hub.errors import HubError

_WORKER = Path(__file__).with_name("template_worker.py")
_PATIENCE = 120.0  # seconds of the clock; it is the seconds of computing that count, and the worker's limit bounds them
_lock = threading.Lock()
_running: list[subprocess.Popen[bytes]] = []  # the worker, or nothing


def ask(source: str, values: Mapping[str, Any] | None) -> str:
    """What a template writes.

    Args:
      source: the template.
      values: what it may name; None: it is only read, and "" comes back.

    Raises:
      HubError: jinja2 is missing, or the template cannot be read, fails, or asks for too much time or memory.
    """
    return _asked({"source": source, "values": values})["text"]


def ask_with_answers(source: str, values: Mapping[str, Any], answers: str) -> tuple[str, list[tuple[int, int]]]:
    """What a template writes, and [first, last) characters of what an assistant says in it.

    Args:
      source: the template.
      values: what it may name.
      answers: "all", or the "last" one alone.

    Raises:
      HubError: as `ask`, and where a template without {% generation %} writes a conversation's first messages otherwise
        than it does alone, so that nothing tells where an answer begins.
    """
    answer = _asked({"source": source, "values": values, "answers": answers})
    return answer["text"], [(first, last) for first, last in answer["spans"]]


@functools.cache
def _has_jinja() -> bool:
    return importlib.util.find_spec("jinja2") is not None


def _asked(request: Mapping[str, Any]) -> dict[str, Any]:
    if not _has_jinja():
        raise HubError("a chat template needs the package jinja2: pip install jinja2")
    with _lock:
        answer = _answered(json.dumps(request).encode() + b"\n")
    if "unreadable" in answer:
        raise HubError(f"the chat template cannot be read: {answer['unreadable']}")
    if "fails" in answer:
        raise HubError(f"the chat template fails: {answer['fails']}")
    return answer


def _answered(request: bytes) -> dict[str, Any]:
    worker = _worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(request)
        worker.stdin.flush()
        line = _line(worker)
        if line.endswith(b"\n"):
            return json.loads(line)
    except BrokenPipeError:  # it has ended
        pass
    except BaseException:  # an answer may be on its way that nobody waits for: the next request gets another worker
        _end()
        raise
    return {"fails": _end()}


def _line(worker: subprocess.Popen[bytes]) -> bytes:
    """The answer; less than a whole line if the worker ended, or had to be."""
    assert worker.stdout is not None
    found, until = bytearray(), time.monotonic() + _PATIENCE
    while not found.endswith(b"\n"):
        ready, _, _ = select.select([worker.stdout], [], [], max(0.0, until - time.monotonic()))
        piece = os.read(worker.stdout.fileno(), 1 << 20) if ready else b""
        if not piece:
            break
        found += piece
    return bytes(found)


def _worker() -> subprocess.Popen[bytes]:
    if not _running or _running[0].poll() is not None:
        _end()
        # In a session of its own: Ctrl-C is not meant for it.
        command = children.python(str(_WORKER))
        _running.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )  # fmt: skip
    return _running[0]


@atexit.register
def _end() -> str:
    """Ends the worker, if there is one; returns why it had ended by itself."""
    if not _running:
        return ""
    worker = _running.pop()
    assert worker.stdout is not None
    ends, _, _ = select.select([worker.stdout], [], [], 0)  # its end can be read, unless it has not ended by itself
    try:
        code = worker.wait(timeout=1.0 if ends else 0)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        code = -signal.SIGALRM
    for pipe in (worker.stdin, worker.stdout):
        assert pipe is not None
        pipe.close()
    if code in (-signal.SIGXCPU, -signal.SIGALRM):
        return "it takes more seconds of computing than a template may"
    return f"its process ended ({code}); it may have needed more memory than a template may have"
