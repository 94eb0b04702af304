"""The server's log: a JSON object a line, about requests and never of what they contain."""

import json
import logging
import sys
import time
from typing import Any, override

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonLines(logging.Formatter):
    """time, level, event, and what was given as `extra`."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found: dict[str, Any] = {"time": f"{when}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        found |= {"event": record.getMessage()}
        found |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str, ensure_ascii=False)


def warn(message: str) -> None:
    """A line that other parts of sepjax have for whoever runs the server."""
    logging.getLogger("sepjax.serve").warning(message.removeprefix("warning: "))


def begin(level: str) -> None:
    """From here on to stderr; of the HTTP library only what went wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, least in (("sepjax.serve", level.upper()), ("sepjax.slots", level.upper()), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
