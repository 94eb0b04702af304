"""What begins with a slash in `sepjax chat`: answered here, never said to the model."""

import enum
from collections.abc import Callable
from typing import Any

from sepjax.config import nearest
from sepjax.generation.talk import Talk

COMMANDS = {  # as the user writes it -> what it does
    "/help": "these lines",
    "/save FOLDER": "keeps the conversation; --resume=FOLDER goes on with it",
    "/clear": "begins anew, as if nothing had been said",
    "/regenerate": "takes the last turn back, and answers it anew",
    "/system TEXT": "begins anew with these instructions; without TEXT: says what they are",
    "/stats": "what the cache holds, and how fast the last answer was",
    "/quit": "ends it, as Ctrl-D does",
}
NAMES = tuple(usage.split()[0] for usage in COMMANDS)
_MORE = """\
//... begins a turn with a slash; Alt-Enter begins another line of a turn.
Ctrl-C cuts an answer short or clears the line; twice leaves, and offers to save."""


class Next(enum.Enum):
    """What comes after a line of the user's."""

    READ = "another line"
    ANSWER = "an answer"
    END = "nothing"


def take(talk: Talk, line: str, report: Callable[[str], Any]) -> Next:
    """Does what a line asks for: a command, or what it says to the model.

    Args:
      talk: the conversation.
      line: of the user's; may have several lines.
      report: gets what there is to say about it.

    Raises UserError where a turn cannot be fed; nothing was said then.
    """
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if not name:
        return Next.READ
    if name.startswith("//"):
        return _said(talk.say(line.strip()[1:]), report)
    if not name.startswith("/"):
        return _said(talk.say(line), report)
    if name == "/regenerate":
        about = talk.say_again()
        if about is None:
            report("there is no turn to answer anew")
            return Next.READ
        return _said(about, report)
    if name == "/quit":
        return Next.END
    _local(talk, name, rest, report)
    return Next.READ


def _said(about: str, report: Callable[[str], Any]) -> Next:
    if about:
        report(about)
    return Next.ANSWER


def _local(talk: Talk, name: str, rest: str, report: Callable[[str], Any]) -> None:
    if name == "/help":
        width = max(map(len, COMMANDS)) + 2
        report("\n".join([*(f"{usage:<{width}}{about}" for usage, about in COMMANDS.items()), _MORE]))
    elif name == "/save":
        report(talk.save(rest))
    elif name == "/clear":
        talk.clear()
        report("begun anew")
    elif name == "/system" and rest:
        talk.clear(rest)
        report("begun anew with these instructions")
    elif name == "/system":
        report(f"instructions: {talk.system}" if talk.system else "no instructions; /system TEXT begins anew with some")
    elif name == "/stats":
        report("\n".join(talk.stats()))
    else:
        report(f"unknown command {name}{nearest(name, NAMES)}; /help lists them, // begins a turn with a slash")
