"""Properties of the source tree itself: what code may import and call, and how long files may get."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = sorted([*ROOT.glob("*.py"), *ROOT.glob("sepjax/**/*.py"), *ROOT.glob("configs/*.py")])
TESTS = sorted(ROOT.glob("tests/**/*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "pyproject.toml", ROOT / ".ci" / "run"])

BASE = {"config", "array_typing", "files", "progress"}
# Room -> the rooms it may import from, besides itself. Rooms that are not listed are above all of these.
MAY_IMPORT = {
    "array_typing": set(),
    "config": set(),
    "files": {"config"},
    "interrupt": set(),
    "command": {"config", "files", "interrupt", "progress", "separators"},
    "separators": BASE | {"console"},
    "layout": BASE | {"separators"},
    "sharding": BASE,
    "measure": set(),
    "console": set(),
    "progress": {"console"},
    "flops": {"config"},
    "attention": BASE | {"separators", "layout", "sharding"},
    "data": BASE | {"console", "separators", "layout", "sharding", "interrupt"},
    "model": BASE | {"separators", "layout", "sharding", "attention"},
    "generation": BASE
    | {
        "separators",
        "layout",
        "sharding",
        "attention",
        "data",
        "model",
        "hub",
        "console",
        "interrupt",
        "run",
        "measure",
    },
    "serve": BASE | {"array_typing", "data", "generation", "hub", "model"},  # of programs and benches alone
    "training": BASE | {"separators", "layout", "sharding", "attention", "data", "model", "flops", "console"},
    "run": BASE | {"console", "measure", "sharding", "model", "training"},
}

UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "tensorflow", "torch"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "os.system", "torch.load"}
UNSAFE_CALLS |= {"yaml.full_load", "yaml.unsafe_load", "os.popen", "subprocess.getoutput", "runpy.run_path"}
# Rooms that may reach the network, when the user asks for it.
NETWORK = {"requests", "urllib", "http", "httpx", "aiohttp", "ftplib", "socket", "huggingface_hub", "datasets"}
MAY_REACH_IT = {
    "sepjax/serve/running.py",  # the socket that it listens on
    "sepjax/hub/remote.py",  # the hub, with --download
    "sepjax/hub/packaged.py",  # the package index, by pip in a process of its own, for the models that it names
    "sepjax/run/workdir.py",  # this host's name
    "sepjax/evaluation/lm_eval_data.py",  # datasets of the tasks that evaluate.py is asked for
}
UNSAFE_ARGUMENTS = {"allow_pickle", "shell"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it runs when the module is imported) of everything that `source` imports."""
    tree = ast.parse(source)
    nested = {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in nested) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", node not in nested) for alias in node.names)


def unsafe(source: str) -> list[str]:
    """What `source` has that could run code hidden in data, or drags in a second framework."""
    found = [name for name, _ in imports(source) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [name for name in [ast.unparse(node.func)] if name in UNSAFE_CALLS]
            found += [k.arg for k in node.keywords if k.arg in UNSAFE_ARGUMENTS and ast.unparse(k.value) != "False"]
    return found


def upward(source: str, room: str) -> list[str]:
    """The imports of `source`, a file of `room`, that point upward."""
    names = [name.split(".") for name, _ in imports(source)]
    rooms = [parts[1] for parts in names if parts[0] == "sepjax" and len(parts) > 1]
    programs = [parts[0] for parts in names if parts[0] in ("train", "evaluate", "configs")]
    programs += [r for r in rooms if r == "programs" and room not in ("programs", "__main__")]  # nobody needs the top
    benches = [r for r in rooms if r == "bench" and room not in ("bench", "programs", "__main__")]
    return programs + benches + [r for r in rooms if room in MAY_IMPORT and r != room and r not in MAY_IMPORT[room]]


def test_the_checks_find_what_they_look_for() -> None:
    assert unsafe("import pickle") == ["pickle"]
    assert unsafe("def f():\n    from pickle import loads") == ["pickle.loads"]
    assert unsafe("np.load(f, allow_pickle=True)") == ["allow_pickle"]
    assert unsafe("eval('1'); yaml.load(f); subprocess.run('x', shell=True)") == ["eval", "yaml.load", "shell"]
    assert unsafe("jax.eval_shape(f); model.eval(); loader.exec_module(m); np.load(f, allow_pickle=False)") == []
    assert upward("from sepjax.model.layers import Block", "attention") == ["model"]
    assert upward("def f():\n    import sepjax.training.step", "model") == ["training"]
    assert upward("from sepjax import training", "layout") == ["training"]
    assert upward("from train import train", "generate") == ["train"]
    assert upward("from sepjax.bench.training import random_batch", "evaluation") == ["bench"]
    assert upward("from sepjax.bench.training import random_batch", "bench") == []
    assert upward("from sepjax.programs import bench", "evaluation") == ["programs"]
    assert upward("from sepjax.attention import xla\nfrom sepjax.config import Config", "attention") == []
    assert dict(imports("import a\nif TYPE_CHECKING:\n    import b")) == {"a": True, "b": False}
    assert PRODUCT
    assert TESTS
    assert DOCUMENTS


@pytest.mark.parametrize("path", PRODUCT, ids=_name)
def test_product_code_runs_nothing_that_hides_in_data(path: Path) -> None:
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize("path", PRODUCT, ids=_name)
def test_product_code_reaches_the_network_in_one_place(path: Path) -> None:
    found = {name.split(".")[0] for name, _ in imports(path.read_text())} & NETWORK
    assert not found or _name(path) in MAY_REACH_IT


@pytest.mark.parametrize("path", sorted(ROOT.glob("sepjax/**/*.py")), ids=_name)
def test_dependencies_point_downward(path: Path) -> None:
    # A package's __main__.py is a program, like train.py: nothing imports it, and it may import from every room.
    room = "__main__" if path.name == "__main__.py" else path.relative_to(ROOT / "sepjax").parts[0].removesuffix(".py")
    assert upward(path.read_text(), room) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("sepjax/**/*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}

    def imported(path: Path) -> set[str]:
        names = {name for name, at_import in imports(path.read_text()) if at_import}
        return ({name if name in modules else name.rpartition(".")[0] for name in names} & set(modules)) - {"sepjax"}

    order = TopologicalSorter({name: imported(path) - {name} for name, path in modules.items()}).static_order()
    assert set(order) == set(modules)  # a cycle raises CycleError, which names it


@pytest.mark.parametrize("path", PRODUCT, ids=_name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", [path for path in PRODUCT if not path.stem.endswith("_kernels")], ids=_name)
def test_files_stay_readable_in_one_go(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


THE_LOOP = {"train.py": {"_train"}}  # reads from top to bottom


@pytest.mark.parametrize("path", [path for path in PRODUCT if not path.stem.endswith("_kernels")], ids=_name)
def test_functions_and_main_blocks_stay_short(path: Path) -> None:
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    # From `def` to the last line: signature, docstring and body.
    lines = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    allowed = THE_LOOP.get(_name(path), set())
    assert {name: n for name, n in lines.items() if n > (80 if name in allowed else 60)} == {}
    # What a program does is in functions, which tests can call; this block only starts it.
    blocks = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    assert [n for node in blocks if (n := (node.end_lineno or 0) - node.lineno + 1) > 10] == []


@pytest.mark.parametrize("path", PRODUCT + TESTS + DOCUMENTS, ids=_name)
def test_nothing_reaches_outside_the_repository(path: Path) -> None:
    # A fresh clone has no neighbours: neither the team's shared folder nor its notes.
    neighbours = ["shared/" + "data", "../" + "shared", "/work" + "/"]
    assert not [name for name in neighbours if name in path.read_text()]


@pytest.mark.parametrize("path", PRODUCT, ids=_name)
def test_product_code_leaves_nothing_open(path: Path) -> None:
    assert not re.findall(r"\b(?:TODO|FIXME|XXX)\b", path.read_text())
