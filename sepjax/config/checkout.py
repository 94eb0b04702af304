"""What stands at the root of a checkout, train.py, evaluate.py and configs/, and inside the package in a wheel."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def root() -> Path:
    """The folder that has them."""
    packaged = Path(__file__).parents[1] / "_root"  # hatch_build.py puts them there
    return packaged if packaged.is_dir() else Path(__file__).parents[2]


def program(name: str) -> ModuleType:
    """A program of the root as a module. By its file, for packages of other projects have such names too."""
    module_name = f"sepjax_root_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, root() / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[module_name]
