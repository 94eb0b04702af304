"""Metrics to Weights & Biases and Trackio, where the user asks for it: `sepjax train --log_to=wandb,trackio`.

Both are packages of others, with one interface: init, log, finish. Where they send to, their own environment variables
say (WANDB_MODE=offline, WANDB_PROJECT, TRACKIO_PROJECT, TRACKIO_SPACE_ID, ...); the project is "sepjax" by default.
"""

import importlib.util
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sepjax.config import Config, UserError, first_line, to_json
from sepjax.console import say
from sepjax.files import write_text

_NAMES = {"wandb": "Weights & Biases", "trackio": "Trackio"}
_FILE = "trackers.json"


class TrackerError(UserError):
    """A tracker that is not there, or that does not take the run."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises TrackerError, which names the extra, where a package is missing."""
    for name in names:
        if name not in _NAMES:
            raise TrackerError(f"--log_to={name} is not one of {', '.join(_NAMES)}")
        if importlib.util.find_spec(name) is None:
            raise TrackerError(
                f'--log_to={name} needs the package of {_NAMES[name]}, which is missing: pip install "sepjax[{name}]"'
            )


class Trackers:
    """The trackers of a run. On processes but the first there are none.

    A run that goes on is the same run there, by an id in its workdir; one that begins anew has another. What a tracker
    does not take is told once, and the run goes on: `metrics.jsonl` is the record.
    """

    def __init__(self, names: Sequence[str], workdir: Path, config: Config, *, resume_step: int = 0):
        """Begins the run on each of these, or goes on with it; raises TrackerError where one of them refuses."""
        self._runs: dict[str, Any] = {}
        if jax.process_index() != 0 or not names:
            return
        name, settings = _id(workdir, anew=resume_step == 0), json.loads(to_json(config))
        for tracker in names:
            try:
                self._runs[tracker] = _begin(tracker, workdir, name, settings)
            except Exception as error:  # of another package, of any kind
                self.close()
                raise TrackerError(
                    f"--log_to={tracker}: {first_line(error)}; fix that, or omit the flag"
                    f"{', or set WANDB_MODE=offline' if tracker == 'wandb' else ''}"
                ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Gives them the metrics of a step. One that fails gets no more."""
        for tracker, run in list(self._runs.items()):
            try:
                run.log(dict(values), step=step)
            except Exception as error:
                self._drop(tracker, error)

    def close(self) -> None:
        """Ends the run there. Safe to call twice."""
        for tracker, run in list(self._runs.items()):
            try:
                run.finish()
            except Exception as error:
                self._drop(tracker, error)
        self._runs = {}

    def _drop(self, tracker: str, error: Exception) -> None:
        del self._runs[tracker]
        say(f"warning: {_NAMES[tracker]} takes no more of this run: {first_line(error)}; metrics.jsonl has all of it")


def _begin(tracker: str, workdir: Path, name: str, settings: Mapping[str, Any]) -> Any:
    project = os.environ.get(f"{tracker.upper()}_PROJECT", "sepjax")
    title = workdir.resolve().name
    if tracker == "trackio":
        import trackio  # pyright: ignore[reportMissingImports]

        # It knows a run by its name alone.
        return trackio.init(project=project, name=f"{title}-{name}", config=settings, resume="allow", embed=False)
    import wandb  # pyright: ignore[reportMissingImports]

    # Lines of the console are left where they are.
    given = {"dir": str(workdir), "config": settings, "settings": {"console": "off"}}
    return wandb.init(project=project, name=title, id=name, resume="allow", **given)


def _id(workdir: Path, *, anew: bool) -> str:
    """What the run is known by; kept in the workdir."""
    file = workdir / _FILE
    if file.is_file() and not anew:
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrackerError(f"{file} is not what sepjax writes ({error!r}); move it away to go on") from error
    name = secrets.token_hex(4)
    write_text(file, json.dumps({"id": name}) + "\n")
    return name
