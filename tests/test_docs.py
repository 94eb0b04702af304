"""Every fenced block of README.md and docs/ is run, or checked as far as it can be, or says what it needs.

Flags of commands are parsed as the programs parse them; names in Python are looked up and calls held against
signatures, in notebooks too; docs/library.md and docs/method.md run, the notebooks with -m soak.
`<!-- needs: docker -->` before a block is for what
no test can check.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from absl import flags

import evaluate
from sepjax import programs
from sepjax.command.flags import read_settings
from sepjax.command.settings import config_flags
from sepjax.config import AttentionConfig, UserError
from sepjax.evaluation.arms import parse_arms
from sepjax.programs.bench import BENCHES
from sepjax.programs.evaluate import needle, recall, windows
from sepjax.programs.picture import mask
from tests.docs_blocks import Block, Namespace, blocks, commands
from tests.runs import scores_of_nothing, start_quickly, step_that_tells_all

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs").glob("notebooks/*.ipynb"))
RUN = {"library.md", "method.md"}  # whose Python runs, block after block
KINDS = {"bash", "python", "json", "text", "ini", "dockerfile"}
# Tools that are not ours; what they do with files and servers is not looked at.
OTHERS = {"cd", ".", "curl", "bash"}
NOT_CACHED = (windows.Settings, needle.Settings, recall.Settings, mask.Settings)  # whose arms say nothing of caches
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where commands find the files that they read while their flags are parsed."""
    path = tmp_path_factory.mktemp("docs")
    (path / "configs").symlink_to(ROOT / "configs")
    (path / "kept.json").write_text("[13, 15]")
    for name in ("rare.npy", "capitals.npy"):
        np.save(path / name, np.array([13, 15]))
    with contextlib.chdir(path), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEPJAX_API_KEY", "as a unit's EnvironmentFile or docker gives it")
        yield path


class Unknown(UserError):
    """A tool of others, in a block that does not say what it needs."""


def wrong_command(words: list[str], *, marked: bool = False) -> str:
    """What is wrong with a command; "" if nothing is, or it is not one of ours."""
    try:
        settings = parsed(words)
    except UserError as error:
        return "" if marked and isinstance(error, Unknown) else str(error)
    except SystemExit as error:
        return "" if not error.code else f"ends with {error.code}"
    arms = getattr(settings, "arms", "") or getattr(settings, "arm", "")
    if isinstance(arms, str) and arms and not arms.startswith("@"):
        try:
            parse_arms(arms, AttentionConfig(), 30, cached=not isinstance(settings, NOT_CACHED))
        except UserError as error:
            return str(error)
    return ""


def parsed(words: list[str]) -> object:
    """The settings that a command line gives; None: not one of ours. Raises as the command itself."""
    match [Path(words[0]).name or words[0], *words[1:]]:
        case ["sepjax", "bench", name, *rest]:
            return bench(BENCHES[name], rest)
        case ["python", "-m", module, *rest] if module.startswith("sepjax.bench."):
            return bench(module, rest)
        case ["sepjax", *rest] | ["python", "-m", "sepjax", *rest]:
            command, rest = programs.choose(rest)
            return programs.read(command, [command, *rest], flags.FlagValues())
        case ["python", "train.py", *rest]:
            return programs.read("train", ["train", *rest], flags.FlagValues())
        case ["python", "evaluate.py", *rest]:
            return evaluate.read(["evaluate.py", *rest], flags.FlagValues())[1]
        case ["python", "-c", code]:
            ast.parse(code)
            return None
        case ["python" | "python3", "-m", "pip", "install", *rest] | ["pip", "install", *rest] if rest:
            named = {
                extra
                for word in rest
                for extra in re.findall(r"[\w.]\[([\w,]+)\]$", word)
                for extra in extra.split(",")
            }
            if unknown := named - EXTRAS.keys():
                raise UserError(f"no extra {', '.join(unknown)}")
            return None
        case ["python" | "python3", "-m", "venv" | "pytest" | "pip" | "mkdocs", *_]:
            return None
        case [tool, *_] if tool in OTHERS:
            return None
    raise Unknown(f"{words[0]!r} is not known here")


def bench(module: str, rest: list[str]) -> object:
    found = importlib.import_module(f"{module}.__main__" if module.endswith(".mesh") else module)
    return read_settings(getattr(found, "CommandLine", None) or found.Settings, [module, *rest], flags.FlagValues(), "")


def checked(block: Block, names: Namespace, known: dict[str, str]) -> list[str]:
    """What is wrong with a block; of one that needs something, what is wrong with commands of ours."""
    if block.needs and block.language != "bash":
        return []
    if block.language == "bash":
        return [
            f"{' '.join(words)}: {said}"
            for words in commands(block.text, known)
            if (said := wrong_command(words, marked=bool(block.needs)))
        ]
    if block.language == "python":
        return names.problems(block.text)
    if block.language == "json":
        lines = block.text.strip().splitlines()
        try:
            json.loads(block.text)
        except json.JSONDecodeError:
            [json.loads(line) for line in lines]
    if block.language == "ini":
        return [
            said for line in re.findall(r"^ExecStart=(.*)$", block.text, re.M) if (said := wrong_command(line.split()))
        ]
    if block.language == "dockerfile":
        words = [json.loads(x) for x in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", block.text, re.M)]
        return [said for said in [wrong_command([word for line in words for word in line])] if said]
    return (
        []
        if block.language in KINDS
        else [f"a block of {block.language or 'no language'}; use {', '.join(sorted(KINDS))}"]
    )


def commands_in(docstring: str) -> Iterator[str]:
    """The indented commands of a docstring, with what it has in brackets; what stands behind spaces is a remark."""
    lines = iter(docstring.splitlines())
    for line in lines:
        if not re.match(r" *(sepjax|python) \S", line):
            continue
        while line.count('"') % 2 or line.endswith("\\"):
            line = f"{line.removesuffix(chr(92))} {next(lines).strip()}"
        yield re.sub(r"[\[\]]| \.\.\.", "", re.split(r"\s{3,}(?!-| )|\s+#", line.strip())[0])


def test_commands_in_docstrings_are_right(folder):
    files = [
        *(ROOT / "sepjax").rglob("*.py"),
        *(ROOT / "configs").glob("*.py"),
        ROOT / "train.py",
        ROOT / "evaluate.py",
    ]
    found, seen = [], 0
    for file in files:
        for line in commands_in(ast.get_docstring(ast.parse(file.read_text())) or ""):
            for words in commands(line):
                seen += 1
                found += [f"{file.name}: {line}: {said}" for said in [wrong_command(words)] if said]
    assert found == []
    assert seen > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_block_is_right_or_says_what_it_needs(page, folder):
    names, known, found = Namespace(), {"HOME": str(folder)}, []
    for block in blocks(page.read_text()):
        found += [f"{page.name}:{block.line}: {problem}" for problem in checked(block, names, known)]
    assert found == []


def test_every_shell_takes_the_commands():
    """zsh, as on macOS, looks for files where a word has one of these outside of quotes, and ends the command."""
    for page in PAGES:
        for block in blocks(page.read_text()):
            script = re.sub(r"(^|\s)#.*$", "", block.text, flags=re.MULTILINE) if block.language == "bash" else ""
            bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", script)
            assert re.findall(r"\S*[\[\]*?]\S*", bare) == [], f"{page.name}:{block.line}"


# Written like settings: keys of GGUF files, a file's name, a placeholder.
NOT_OURS = {"attention.scale", "model.safetensors", "x.y"}
FIELDS = {path.removeprefix("config.") for path, _ in config_flags()}
SECTIONS = {path.split(".")[0] for path in FIELDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_settings_in_the_text_are_known(page):
    """Within `code`, and in lines that are indented as code."""
    text = page.read_text()
    named = re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)+)", text)
    named += [x for x in re.findall(r"`([a-z]+\.[a-z_.]+)(?:[=`])", text) if x.split(".")[0] in SECTIONS]
    spans = [
        *re.findall(r"`((?:sepjax|python -m sepjax) [^`$]+)`", text),
        *re.findall(r"^ {4,}(sepjax [^\n]+)$", text, re.M),
    ]
    wrong = {x for x in named if x not in FIELDS | NOT_OURS and not any(f.startswith(f"{x}.") for f in FIELDS)}
    assert {x for x in wrong if not (ROOT / "sepjax" / x.replace(".", "/")).with_suffix("").exists()} == set()
    assert [said for span in spans if (said := unknown_in(span.split()))] == []


def test_tests_that_pages_name_are_there():
    """By their file, and by the beginning of their name where it ends with dots."""
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    found, seen = [], 0
    for page in PAGES:
        file = ""
        for named, test in re.findall(r"`(?:[\w/]*/)?(test_\w+\.py)?(?:::(test_\w+))?(?:\.\.\.)?`", page.read_text()):
            file, seen = named or file, seen + bool(named or test)
            if (named or test) and f"def {test}" not in tests.get(file, ""):
                found.append(f"{page.name}: {file}::{test}")
    assert found == []
    assert seen > 40


def unknown_in(words: list[str]) -> str:
    """The first command or flag that there is not, of a command whose other words may stand for something."""
    words = words[words.index("sepjax") + 1 :]
    bare = [word.strip(",.;") for word in words]
    command = next((c for c in (" ".join(bare[:2]), bare[0]) if c in programs.COMMANDS), None)
    if command is None:
        jobs = {name.split()[0] for name in programs.COMMANDS}
        known = bare[0] in jobs | {"--help", "--version"} or (bare[0] == "bench" and {*bare[1:2]} <= {*BENCHES, "NAME"})
        return "" if known else f"sepjax {' '.join(words)}: no such command"
    for word in bare:
        flag = re.match(r"--(?:no)?([a-z_]+)", word)
        if flag and flag[1] not in programs.names(command) | {"help"} and f"no{flag[1]}" not in programs.names(command):
            return f"sepjax {' '.join(words)}: no flag --{flag[1]}"
    return ""


@pytest.mark.parametrize("page", sorted(RUN))
def test_the_page_s_python_runs(page, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: our own errors come first
    space: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks((ROOT / "docs" / page).read_text()):
            if block.language == "python" and (not block.needs or importlib.util.find_spec(block.needs)):
                exec(compile(block.text, f"{page}:{block.line}", "exec"), space)
    if page == "method.md":
        assert printed.getvalue().startswith("[135005] 0.0643")


def cells(path: Path) -> list[str]:
    """The code of a notebook, which holds no outputs."""
    found = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in found:
        assert (cell["outputs"], cell["execution_count"]) == ([], None), "run them elsewhere: outputs grow stale"
    return ["".join(cell["source"]) for cell in found]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_name_what_there_is(path):
    names = Namespace()
    assert [problem for cell in cells(path) for problem in names.problems(cell)] == []


@pytest.mark.soak  # ten seconds each; docs/library.md, above, runs always
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start_quickly(monkeypatch)
    # Its run is one of train.py, read anew; that such a run learns is in test_train.py.
    monkeypatch.setattr("sepjax.training.step.train_step", step_that_tells_all)
    monkeypatch.setattr("sepjax.training.step.eval_step", scores_of_nothing)
    space: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in cells(path):
            exec(compile(cell, path.name, "exec"), space)


def test_what_is_wrong_is_found(folder):
    """The measure itself."""
    page = "\n".join(
        [
            "```bash",
            "sepjax generate --modle=x --prompt=y  # why",
            "K=1 && rm -rf $K",
            "```",
            "<!-- needs: a -->",
            "```x",
            "```",
        ]
    )
    block, marked = blocks(page)
    assert (block.line, marked.needs) == (2, "a")
    found = checked(block, Namespace(), {})
    assert "unknown flag --modle; did you mean '--model'" in found[0], found
    assert found[1] == "rm -rf 1: 'rm' is not known here"
    cases = {
        "python evaluate.py --workdir=x --arms='dense; sink_windw n=3'": "sink_windw",
        "python train.py --config=configs/sep_tiny.py --workdir=x --config.training.stps=3": "stps",
        "sepjax bench attention --lenths=3": "lenths",
        "pip install -e '.[smollm9]'": "smollm9",
    }
    for line, said in cases.items():
        (words,) = commands(line)
        assert said in wrong_command(words), line
    python = {
        "import sepjax\nsepjax.lod('x')": "sepjax.lod does not exist",
        "import sepjax\nm, t = sepjax.load('x')\nsepjax.generate(m, t, ['a'], max_tokens=3)": "max_tokens",
        "import sepjax\ne = sepjax.Generator(m, t)\ne.steam('x')": "e.steam does not exist",
        "import sepjax\ns = sepjax.Generator(m, t).slots(2)\ns.submt(3)": "s.submt does not exist",
        "from sepjax.layout import build_layut": "sepjax.layout.build_layut does not exist",
    }
    for code, said in python.items():
        (problem,) = Namespace().problems(code)
        assert said in problem
    assert Namespace().problems("import sepjax\nfor event in sepjax.stream(m, t, 'x'):\n    print(event.text)") == []
    assert "no such command" in unknown_in(["sepjax", "trian"])
    assert "no flag --wat" in unknown_in(["sepjax", "generate", "--wat=3"])
