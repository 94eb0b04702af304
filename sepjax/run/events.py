"""What writes TensorBoard's files: a writer, and the messages in them."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, cast


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Inside, a package that was not imported before is as if it were not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # pyright: ignore[reportArgumentType]  (how Python writes down that there is none)
    try:
        yield
    finally:
        del sys.modules[name]


# tensorboardX imports torch wherever there is one, for what is not used here: 3 seconds of every start.
with _without("torch"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

_event, _summary = cast(Any, event_pb2), cast(Any, summary_pb2)  # generated code, whose names no type checker sees
Event, SessionLog, Summary = _event.Event, _event.SessionLog, _summary.Summary

__all__ = ["Event", "EventsWriter", "SessionLog", "Summary"]
