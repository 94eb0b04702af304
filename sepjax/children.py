"""Programs that run beside this one: of this very tree, under the same Python, whatever the working folder holds."""

import os
import site
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def python(*arguments: str) -> list[str]:
    """This Python, for a file or a line of code. It would look for all that is imported beside that file, or in the
    working folder, first, where a text, a script or a dataset of the user's may have such a name (`queue.py`): not so
    with -P.
    """
    return [sys.executable, "-P", *arguments]


def command(module: str) -> list[str]:
    """The same, for a module."""
    return python("-m", module)


def spare_spawned() -> None:
    """The same for processes that `multiprocessing` begins from here on; what it runs is not ours to say."""
    os.environ["PYTHONSAFEPATH"] = "1"


def environment() -> dict[str, str]:
    """This process's variables, with this tree among the places where Python looks for packages."""
    if str(_ROOT) in (*site.getsitepackages(), site.getusersitepackages()):
        return dict(os.environ)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
