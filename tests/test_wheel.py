"""The wheel, built and installed without a network: everything is in it, and its command works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.runs import losses

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_everything_is_in_the_wheel_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    packaged = {name for name in names if name.startswith("sepjax/")}
    page = [path for kind in ("html", "css", "js") for path in ROOT.glob(f"sepjax/**/*.{kind}")]
    here = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("sepjax/**/*.py"), *page]} | {"sepjax/py.typed"}
    assert {"sepjax/serve/page/index.html", "sepjax/serve/page/page.js"} < here
    configs = [path.name for path in ROOT.glob("configs/*") if path.suffix in (".py", ".arm")]
    roots = ["train.py", "evaluate.py", *(f"configs/{name}" for name in configs)]
    assert packaged == here | {f"sepjax/_root/{name}" for name in roots}
    assert {name.split("/")[0] for name in names} == {"sepjax", "sepjax-0.1.0.dist-info"}


@pytest.fixture(scope="module")
def sepjax(wheel, tmp_path_factory):
    """The installed command, run in a folder that is no checkout."""
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True, capture_output=True)
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | os.environ | {"PYTHONPATH": str(site)}

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, site / "bin" / "sepjax", *words],
            cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr[-4000:]
        return done.stderr if code else done.stdout

    run.folder = elsewhere
    return run


def test_an_installed_sepjax_finds_its_programs_and_configs(sepjax):
    """train.py and a config by its name; that it trains is below, with -m soak."""
    err = sepjax("train", "--config=sep_tiny", "--workdir=run", "--config.data.name=nowhere", code=2)
    assert err.count("\n") == 1, err
    assert "nowhere" in err


@pytest.mark.soak
def test_an_installed_sepjax_trains_generates_and_evaluates(sepjax):
    """With a reader of data, a process of its own that runs the console script again."""
    texts = sepjax.folder / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text("The cat sat on the mat, and looked. Where is it? It ran away! " * 12)
    small = ("training.steps=2", "training.log_every=1", "training.eval_batches=1", "data.sequence_length=64")
    small += ("data.name=texts", "data.tokenizer_vocab_size=290", "data.num_workers=1")
    flags = [f"--config.{change}" for change in small]
    out = sepjax("train", "--config=sep_tiny", "--workdir=run", *flags)
    assert "run: starts" in out
    assert sorted(losses(sepjax.folder / "run")) == [1, 2]
    assert sepjax("generate", "--workdir=run", "--prompt=The function", "--max_new_tokens=3").strip()
    out = sepjax("evaluate", "windows", "--workdir=run", "--patterns=separator", "--max_documents=2")
    assert "written to run/evaluations/windows_corpus_step2_" in out
