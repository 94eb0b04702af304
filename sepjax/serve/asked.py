"""What the application asks of whoever answers: the `Worker` itself, or one in another process."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sepjax.clocks import Clocks
from sepjax.serve.conversations import Conversations
from sepjax.serve.jobs import Inbox, Job
from sepjax.serve.served import Served


@runtime_checkable
class Asked(Protocol):
    """In the thread of the event loop, but for `check_room`."""

    clocks: Clocks  # where its threads spend their time

    @property
    def conversations(self) -> Conversations | None:
        """Those that are kept; None: elsewhere, or not yet."""
        ...

    def ready(self) -> Served:
        """The model; raises ApiError(503) while it is being loaded, or the server stops."""
        ...

    def check_room(self, choices: int) -> None:
        """Raises ApiError where so many would not be answered now, as far as is known here."""
        ...

    def inbox(self) -> Inbox:
        """A new one, for one request."""
        ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes all of these on, or none. Raises ApiError, or has one put into their inbox."""
        ...

    def cancel(self, inbox: Inbox) -> None:
        """Nobody reads this any more."""
        ...

    def caught_up(self, inbox: Inbox) -> None:
        """A client whose rows may have been put aside has read what there was."""
        ...

    async def metrics(self) -> bytes:
        """What /metrics tells."""
        ...

    async def view(self, name: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """`sepjax.serve.view.find`."""
        ...
