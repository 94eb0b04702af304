"""Properties of the source tree itself: what code may import and call, and how long files may get."""

import ast
import functools
import re
from collections.abc import Callable, Iterable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

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
    "children": set(),
    "command": {"config", "console", "files", "interrupt", "progress", "promotion", "separators"},
    "separators": BASE | {"console"},
    "layout": BASE | {"separators"},
    "sharding": BASE,
    "measure": set(),
    "clocks": set(),
    "promotion": set(),
    "console": set(),
    "progress": {"console"},
    "flops": {"config"},
    "attention": BASE | {"separators", "layout", "sharding"},
    "data": BASE | {"console", "children", "separators", "layout", "sharding", "interrupt"},
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
        "clocks",
        "promotion",
    },
    # Of programs and benches alone.
    "serve": BASE | {"array_typing", "children", "clocks", "data", "generation", "hub", "interrupt", "model"},
    "training": BASE
    | {"separators", "layout", "sharding", "attention", "data", "model", "flops", "console", "interrupt"},
    "run": BASE | {"console", "measure", "sharding", "model", "training"},
}

UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "tensorflow", "torch"}
PEERS = ROOT / "sepjax/bench/peers_worker.py"  # runs under a Python of the user's, in a process of its own
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "os.system", "torch.load"}
UNSAFE_CALLS |= {"yaml.full_load", "yaml.unsafe_load", "os.popen", "subprocess.getoutput", "runpy.run_path"}
# Rooms that may reach the network, when the user asks for it.
NETWORK = {"requests", "urllib", "http", "httpx", "aiohttp", "ftplib", "socket", "huggingface_hub", "datasets"}
NETWORK |= {"wandb", "trackio"}
MAY_REACH_IT = {
    "sepjax/serve/running.py",  # the socket that it listens on
    "sepjax/serve/fronts.py",  # the pairs of sockets between its processes, and that one for them
    "sepjax/serve/front.py",
    "sepjax/hub/remote.py",  # the hub, with --download
    "sepjax/hub/packaged.py",  # the package index, by pip in a process of its own, for the models that it names
    "sepjax/data/hub_rows.py",  # data.name=hf://OWNER/NAME
    "sepjax/run/workdir.py",  # this host's name
    "sepjax/run/trackers.py",  # what --log_to names
    "sepjax/evaluation/lm_eval_data.py",  # datasets of the tasks that evaluate.py is asked for
}
UNSAFE_ARGUMENTS = {"allow_pickle", "shell"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def wrong(paths: Iterable[Path], found: Callable[[Path], Any]) -> dict[str, Any]:
    """What `found` finds in each file that has some of it. A test of each file for itself would be 2,000 of them."""
    return {_name(path): what for path in paths if (what := found(path))}


_text = functools.cache(Path.read_text)
_parsed = functools.cache(ast.parse)


@functools.cache
def imports(source: str) -> tuple[tuple[str, bool], ...]:
    """(dotted name, whether it runs when the module is imported) of everything that `source` imports."""
    tree, found = _parsed(source), []
    nested = {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in nested) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(f"{module}.{alias.name}", node not in nested) for alias in node.names]
    return tuple(found)


def unsafe(source: str) -> list[str]:
    """What `source` has that could run code hidden in data, or drags in a second framework."""
    found = [name for name, _ in imports(source) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(_parsed(source)):
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


def test_product_code_runs_nothing_that_hides_in_data() -> None:
    assert wrong([path for path in PRODUCT if path != PEERS], lambda path: unsafe(_text(path))) == {}
    assert unsafe(_text(PEERS)) == ["torch"]


def test_product_code_reaches_the_network_in_one_place() -> None:
    found = wrong(PRODUCT, lambda path: {name.split(".")[0] for name, _ in imports(_text(path))} & NETWORK)
    assert set(found) <= MAY_REACH_IT, found


def test_programs_that_run_beside_ours_are_begun_in_one_way() -> None:
    """Which keeps the working folder out of their imports: see `sepjax.children`."""
    assert wrong(PRODUCT, lambda path: "sys.executable" in _text(path)).keys() == {"sepjax/children.py"}


def test_dependencies_point_downward() -> None:
    def found(path: Path) -> list[str]:
        # A package's __main__.py is a program, like train.py: nothing imports it, and it may import from every room.
        is_program = path.name == "__main__.py"
        room = "__main__" if is_program else path.relative_to(ROOT / "sepjax").parts[0].removesuffix(".py")
        return upward(_text(path), room)

    assert wrong(ROOT.glob("sepjax/**/*.py"), found) == {}


def test_no_module_imports_itself_by_way_of_others() -> None:
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("sepjax/**/*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}

    def imported(path: Path) -> set[str]:
        names = {name for name, at_import in imports(_text(path)) if at_import}
        return ({name if name in modules else name.rpartition(".")[0] for name in names} & set(modules)) - {"sepjax"}

    order = TopologicalSorter({name: imported(path) - {name} for name, path in modules.items()}).static_order()
    assert set(order) == set(modules)  # a cycle raises CycleError, which names it


def test_every_module_says_what_it_is_for() -> None:
    assert wrong(PRODUCT, lambda path: not ast.get_docstring(_parsed(_text(path)))) == {}


def test_files_stay_readable_in_one_go() -> None:
    files = [path for path in PRODUCT if not path.stem.endswith("_kernels")]
    lengths = {_name(path): len(_text(path).splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


THE_LOOP = {"train.py": {"_train"}}  # reads from top to bottom


def _lines(node: ast.stmt) -> int:
    """From `def` or `if` to the last line: signature, docstring and body."""
    return (node.end_lineno or 0) - node.lineno + 1


def test_functions_and_main_blocks_stay_short() -> None:
    def found(path: Path) -> list[tuple[str, int]]:
        tree, allowed = _parsed(_text(path)), THE_LOOP.get(_name(path), set())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        long = [(x.name, n) for x in functions if (n := _lines(x)) > (80 if x.name in allowed else 60)]
        # What a program does is in functions, which tests can call; this block only starts it.
        blocks = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
        return long + [("__main__", n) for x in blocks if (n := _lines(x)) > 10]

    assert wrong([path for path in PRODUCT if not path.stem.endswith("_kernels")], found) == {}


def test_nothing_reaches_outside_the_repository() -> None:
    # A fresh clone has no neighbours: neither the team's shared folder nor its notes.
    neighbours = ["shared/" + "data", "../" + "shared", "/work" + "/"]
    files = PRODUCT + TESTS + DOCUMENTS
    assert wrong(files, lambda path: [name for name in neighbours if name in _text(path)]) == {}


def test_product_code_leaves_nothing_open() -> None:
    assert wrong(PRODUCT, lambda path: re.findall(r"\b(?:TODO|FIXME|XXX)\b", _text(path))) == {}


def test_aliases_of_types_have_names_of_their_own():
    """The type checker of the tests knows an alias by its name alone: with two, the second is checked as the first."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "sepjax").rglob("*.py"):
        for name, what in re.findall(r"^type (\w+)(?:\[.*?\])? = (.*)$", path.read_text(), re.MULTILINE):
            found.setdefault(name, set()).add(what.partition("  #")[0])
    assert {name: kinds for name, kinds in found.items() if len(kinds) > 1} == {}
