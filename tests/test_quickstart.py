"""A new user's first commands, as docs/quickstart.md has them: from nothing, the real model, texts of their own.

Needs a package index, and the file of smollm2-135m: in $SEPJAX_SMOLLM2, or in sepjax's cache, where commands put it.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sepjax.files import CACHE, cache_folder
from sepjax.hub.packaged import SMOLLM2
from tests.runs import losses

ROOT = Path(__file__).parents[1]
MODEL = Path(f"{SMOLLM2.name}-{SMOLLM2.version}") / SMOLLM2.file
MOST = 1200  # CPU seconds: ten minutes of two cores


def commands() -> list[str]:
    section = (ROOT / "docs" / "quickstart.md").read_text().partition("## Your own text in five commands")[2]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].splitlines()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """This tree without what git ignores, with a folder of texts: the documentation."""
    folder = tmp_path / "sepjax"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "tests"))
    (folder / "mine").mkdir()
    for page in sorted((ROOT / "docs").glob("*.md")):
        shutil.copy(page, folder / "mine" / f"{page.stem}.txt")
    shutil.copy(ROOT / "README.md", folder / "mine" / "letter.txt")
    return folder


@pytest.mark.soak
def test_five_commands_in_ten_minutes_of_two_cores(checkout, tmp_path, monkeypatch):
    given = os.environ.get("SEPJAX_SMOLLM2")
    file = Path(given) if given else cache_folder() / MODEL
    if not file.is_file():
        pytest.skip(f"no {SMOLLM2.file}: set SEPJAX_SMOLLM2, or run sepjax generate --model=smollm2-135m once")
    (tmp_path / "cache" / MODEL).parent.mkdir(parents=True)
    shutil.copy(file, tmp_path / "cache" / MODEL)
    for name in (
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        "PYTHONPATH",
        "VIRTUAL_ENV",
    ):
        monkeypatch.delenv(name, raising=False)  # of this test session
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    install, *others = commands()
    assert len(others) == 4
    spent: list[tuple[str, float, float]] = []

    def run(command: str, said: str = "") -> str:
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command], cwd=checkout, input=said, capture_output=True, text=True, timeout=3600, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        spent.append((command, time.monotonic() - begun, cpu))
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    run(install)
    picture, chat, train, report = (f". .venv/bin/activate && {command}" for command in others)
    run(picture)
    answer = run(chat, "What is a comma for? Answer in one sentence.\n/quit\n")
    run(train)
    run(report)
    for command, seconds, cpu in spent:
        print(f"{seconds:6.0f} s, {cpu:6.0f} s of CPU   {command}")
    page = (checkout / "kept.html").read_text()
    assert "<input" in page, "a slider"
    assert "256 held" in page
    assert len(answer.split()) > 3
    workdir = checkout / "runs" / "mine"
    assert sorted(losses(workdir)) == list(range(1, 17))
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    before, after = (record["eval/loss"] for record in records if "eval/loss" in record)
    assert after < before - 0.1, "it was 4.21, and 3.89 after these steps"
    assert "smollm2-135m" in (workdir / "report.html").read_text()
    assert sum(cpu for _, _, cpu in spent) < MOST, spent
