"""No network unasked, nothing unpinned; tests/test_tree.py reads the tree for code that data could run: promise 11."""

import re
import socket
import tomllib
from pathlib import Path

import pytest

import sepjax
from sepjax.hub.errors import HubError

ROOT = Path(__file__).parents[2]


def test_nothing_is_fetched_unless_asked_for(tmp_path, monkeypatch):
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="to download it from the Hugging Face hub, say so"):
        sepjax.load("nobody/no-such-model")
    assert asked == []
    with pytest.raises(HubError, match="cannot download 'nobody/no-such-model'"):
        sepjax.load("nobody/no-such-model", download=True)
    assert asked  # the guard would have noticed


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_to_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = [project["optional-dependencies"][extra] for extra in ("test", "dev", "compile", "plot", "gguf")]
    wanted = {
        canonical(re.match(r"[\w.-]+", requirement)[0])
        for requirements in (project["dependencies"], *tested)
        for requirement in requirements
    } - {"sepjax"}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in lines)
    pinned = [canonical(line.partition("==")[0]) for line in lines]
    assert len(set(pinned)) == len(pinned)
    assert sorted(wanted - set(pinned)) == []
