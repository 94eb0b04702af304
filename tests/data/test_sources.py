"""Documents from files, from the installation and from prepared datasets: complete, split for good, errors by name."""

import dataclasses
import gzip
import os
import re
import resource
import shlex
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.config import DataConfig
from sepjax.data.corpora.docstrings import PACKAGES, documents, is_prose, source_files
from sepjax.data.corpora.embedded.embedded import Embedded
from sepjax.data.corpora.splits import held_out
from sepjax.data.corpora.text_folder import text_folder
from sepjax.data.corpora.text_folder.text_folder import TextFolder
from sepjax.data.errors import DataError
from sepjax.data.locks import exclusive
from sepjax.data.sources import PreparedTexts, text_source
from sepjax.data.texts import TextSource

ROOT = Path(__file__).parents[2]
PROSE = " ".join(["This function returns what its caller asked for, and nothing else."] * 6)


def read(name: object, data_dir: object, split: str = "train", **settings: str) -> TextSource:
    return text_source(DataConfig(name=str(name), **settings), str(data_dir), split)


def test_a_folder_gives_every_file_once(corpus, data_dir):
    texts = sorted(file.read_text() for file in corpus.iterdir())
    train, validation = read(corpus, data_dir), read(corpus, data_dir, "validation")
    assert len(train)
    assert len(validation)
    assert sorted([*train, *validation]) == texts
    assert sorted(read(corpus, data_dir, "all")) == texts


def test_a_source_is_a_sequence(corpus, data_dir):
    source = read(corpus, data_dir)
    texts = list(source)
    assert source[-1] == texts[-1]
    assert source[2:5] == texts[2:5]
    assert source.read([7, 0, 7]) == [texts[7], texts[0], texts[7]]
    with pytest.raises(IndexError):
        source[len(source)]
    assert 1 <= source.documents_for(1) <= source.documents_for(10**9) == 1024


@given(keys=st.sets(st.text(max_size=5), max_size=60))
def test_validation_takes_some_but_not_all(keys):
    chosen = held_out(sorted(keys))
    assert chosen <= keys
    assert chosen == held_out(sorted(keys, reverse=True))
    if len(keys) > 1:
        assert 0 < len(chosen) < len(keys)


def test_a_document_does_not_change_sides_when_others_come():
    """Short lists may lend a document to an empty side; beyond that, a key's side is its own."""
    keys = [f"book {i}" for i in range(4000)]
    assert held_out(keys) & set(keys[:2000]) == held_out(keys[:2000])
    assert 40 < len(held_out(keys)) < 130  # 2 % of 4000 is 80, give or take 5 standard deviations of 9


@given(
    paragraphs=st.lists(st.text("abc \n", min_size=1, max_size=40).filter(str.strip), min_size=3, max_size=30),
    border=st.sampled_from(["\n\n", "\n", " "]),
)
def test_a_single_file_is_cut_in_two(paragraphs, border, tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    text = border.join(paragraphs)
    (folder / "book.txt").write_text(text)
    builder = TextFolder(path=folder / "book.txt", data_dir=folder)
    (_, train), (_, validation) = (next(iter(g)) for g in builder._split_generators(None).values())
    assert train["text"] + validation["text"] == text
    assert train["text"].strip()
    assert validation["text"].strip()
    assert len(train["text"]) <= max(0.95 * len(text), 1)


def test_a_single_file_is_cut_at_a_paragraph(tmp_path, data_dir):
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"Paragraph {i}.\nIts second line." for i in range(100)))
    (train,), (validation,) = read(file, data_dir), read(file, data_dir, "validation")
    assert train + validation == file.read_text()
    assert train.endswith("line.\n\n")
    assert validation.startswith("Paragraph ")
    assert 0.93 < len(train) / len(file.read_text()) <= 0.95
    assert list(read(file, data_dir, "all")) == [file.read_text()]


def test_texts_keep_everything_but_line_ends(tmp_path, data_dir):
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\ntwo  \t\r\n\r\n漢字 \0 x".encode())
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "b.txt").write_text("b")
    (tmp_path / "ignored.md").write_text("c")
    assert sorted(read(tmp_path, data_dir, "all")) == ["One\ntwo  \t\n\n漢字 \0 x", "b"]


def test_a_long_book_is_one_document(tmp_path, data_dir):
    (tmp_path / "book.txt").write_text("All work and no play, he wrote.\n" * 400_000)  # 12.8 MB
    (text,) = read(tmp_path, data_dir, "all")
    assert len(text) == 32 * 400_000


def test_unchanged_files_are_prepared_once_and_changed_ones_anew(tmp_path):
    file, data_dir = tmp_path / "text" / "a.txt", tmp_path / "data"
    file.parent.mkdir()
    file.write_text("one")
    assert list(read(file.parent, data_dir, "all")) == ["one"]
    prepared = sorted((data_dir / "text_folder").rglob("*"))
    assert list(read(file.parent, data_dir, "all")) == ["one"]
    assert sorted((data_dir / "text_folder").rglob("*")) == prepared
    file.write_text("two")  # as long as before
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert list(read(file.parent, data_dir, "all")) == ["two"]
    (file.parent / "b.txt").write_text("three")
    assert sorted(read(file.parent, data_dir, "all")) == ["three", "two"]


def test_a_folder_is_read_as_a_person_sees_it(tmp_path):
    """What is hidden is not read; what is linked is, once; names count by their letters, large or small."""
    there, folder = tmp_path / "elsewhere", tmp_path / ".hidden" / "texts"
    for place in (there, folder / ".git"):
        place.mkdir(parents=True)
        (place / "a.txt").write_text(place.name)
    (folder / "._b.txt").write_bytes(b"\xff")
    (folder / "C.TXT").write_text("c")
    (folder / "d.ndjson").write_text('{"text": "d"}\n')
    (folder / "linked").symlink_to(there)
    (folder / "round").symlink_to(folder)
    assert sorted(read(folder, tmp_path / "p", "all")) == ["c", "d", "elsewhere"]
    (folder / "e.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"e\.txt' is a link to 'nowhere', which does not exist; fix or remove it"):
        read(folder, tmp_path / "p", "all")


def test_a_link_to_a_file_is_of_the_kind_that_its_own_name_says(tmp_path):
    """A cache of the hub links names to files that are called by a digest."""
    (tmp_path / "3fa9").write_bytes(gzip.compress(b"a text"))
    (tmp_path / "a.txt.gz").symlink_to("3fa9")
    (tmp_path / "7c01").write_text('{"text": "b"}\n{"text": "c"}\n')
    (tmp_path / "b.jsonl").symlink_to("7c01")
    assert list(read(tmp_path / "a.txt.gz", tmp_path / "p", "all")) == ["a text"]
    assert sorted(read(tmp_path / "b.jsonl", tmp_path / "p", "all")) == ["b", "c"]


def test_a_text_that_changes_while_it_is_prepared_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")

    def changed(path):
        text = path.read_text()
        path.write_text("two, " + text)
        return text

    monkeypatch.setattr(text_folder, "read_text", changed)
    with pytest.raises(DataError, match=r"a\.txt' changed while it was read: it had 3 bytes, now 8"):
        read(tmp_path / "a.txt", tmp_path / "p", "all")
    monkeypatch.setattr(text_folder, "read_text", lambda path: path.unlink() or "one")
    with pytest.raises(DataError, match=r"a\.txt' was there and cannot be read any more: No such file"):
        read(tmp_path / "a.txt", tmp_path / "p", "all")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.json", r"a\.json' is not read by that name: name it \.jsonl if every line is an object, or name it \.txt"),
        ("a.json.gz", r"a\.json\.gz' is not read by that name: name it \.jsonl if"),
        ("a.CSV", r"a\.CSV' is not read by that name: have datasets read it \(hf://FOLDER\), or"),
        ("pipe", r"pipe' is neither a file nor a folder"),
    ],
)
def test_tables_and_pipes_are_not_read_as_one_text(name, message, tmp_path):
    path = tmp_path / name
    os.mkfifo(path) if name == "pipe" else path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(DataError, match=message):
        read(path, tmp_path / "p", "all")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def walk(root, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", f"{root}/private"))
        return []

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(DataError, match=r"cannot read folder '.*/private': Permission denied"):
        read(tmp_path, tmp_path / "p", "all")


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ({}, "train", r"holds no \.txt, .* files .*; it has no files"),
        ({"a.md": b"x", "b.md": b"x", "c.csv": b"1"}, "train", r"holds no .*; it has 2 \.md, 1 \.csv"),
        ({"a.json": b"{}"}, "train", r"it has 1 \.json; JSON lines are named \.jsonl"),
        ({"a.txt.xz": b"x"}, "train", r"a\.txt\.xz' is packed in a way that is not read"),
        ({"a.txt": b" \n"}, "train", r"a\.txt' is empty"),
        ({"a.txt": b"fine", "b.txt": "caf\u00e9s".encode("latin-1")}, "train", r"b\.txt' is not UTF-8 text: .*byte 3"),
        ({"a.txt": b"x"}, "train", r"a\.txt' is too short"),
        ({"a.txt": b"one", "b.txt": b"two"}, "test", "cannot read split 'test'.*train, validation"),
    ],
)
def test_bad_files_are_named(files, split, message, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(folder, tmp_path / "data", split)


def test_files_of_no_use_are_left_out_of_a_folder(tmp_path):
    """Up to as many as are allowed, also when the folder was prepared before; names need not be UTF-8."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("one")
    (folder / "a.txt").write_text("two")
    (folder / "b.txt").write_bytes("three".encode("utf-16"))
    (folder / "c.txt").write_text("")
    settings = DataConfig(name=str(folder), max_bad_documents=2)
    assert sorted(text_source(settings, str(tmp_path / "data"), "all")) == ["one", "two"]
    with pytest.raises(DataError, match=r"c\.txt' is empty, and 1 before .*max_bad_documents=2$"):
        text_source(dataclasses.replace(settings, max_bad_documents=1), str(tmp_path / "data"), "all")
    with pytest.raises(DataError, match=r"b\.txt' is not UTF-8 text: .*iconv -f UTF-16 .*max_bad_documents=1$"):
        read(folder, tmp_path / "other", "all")


def test_a_failed_preparation_leaves_nothing_behind(tmp_path):
    """A torn dataset would be taken for a whole one; here the error is mended and the next attempt is clean."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("fine")
    (tmp_path / "texts" / "b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError):
        read(tmp_path / "texts", tmp_path / "data", "all")
    assert not list((tmp_path / "data").rglob("dataset_info.json"))
    assert not list((tmp_path / "data").rglob("*array_record*"))
    (tmp_path / "texts" / "b.txt").write_bytes(b"mended")
    assert sorted(read(tmp_path / "texts", tmp_path / "data", "all")) == ["fine", "mended"]


def test_prepared_tfds_datasets_are_read_by_name(corpus, tmp_path):
    """Any TFDS dataset that is on disk: here one of ours stands for it, and TFDS has only its files to go by."""
    data_dir = tmp_path / "tfds"
    TextFolder(path=corpus, data_dir=data_dir, file_format="array_record").download_and_prepare()
    (config,) = (data_dir / "text_folder").iterdir()
    by_name = read(f"text_folder/{config.name}", data_dir, "train[:50%]")
    assert 0 < len(by_name) < 40
    assert set(by_name) < {file.read_text() for file in corpus.iterdir()}
    names = read(f"text_folder/{config.name}", data_dir, text_key="name")
    assert names[0].endswith(".txt")
    with pytest.raises(DataError, match=r"no text field 'story'; set data.text_key to one of its texts: .*'text'"):
        read(f"text_folder/{config.name}", data_dir, text_key="story")


def test_a_builder_of_ones_own_is_prepared_without_tensorflow(tmp_path):
    """As docs/data.md says, line by line."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    (code,) = [text for language, text in blocks if language == "python"]
    (command,) = [text for _, text in blocks if "download_and_prepare" in text]
    (tmp_path / "my_books").mkdir()
    (tmp_path / "my_books" / "__init__.py").touch()
    (tmp_path / "my_books" / "my_books.py").write_text(code)
    subprocess.run(
        [sys.executable, "-c", shlex.split(command)[2]], cwd=tmp_path, check=True, timeout=120, capture_output=True
    )
    assert sorted(read("my_books", tmp_path / "DATA", "validation")) == [f"The text of book {i}." for i in range(2)]
    assert len(read("my_books", tmp_path / "DATA")) == 98


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_set",
            "neither 'embedded' nor 'recall', nor an existing file or folder, nor a TFDS .*no_such_set not found",
        ),
        ("/no/such/folder", "'/no/such/folder' is neither"),
        ("lm1b", r"'lm1b' is not prepared: looked in .*lm1b.* Nothing is downloaded unasked: set data.data_dir, or "),
        ("text_folder", "neither 'embedded'"),
    ],
)
def test_missing_datasets_say_what_was_tried(name, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(name, tmp_path)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package that must not be imported, with docstrings of all kinds."""
    folder = tmp_path_factory.mktemp("site") / "some_prose"
    (folder / "tests").mkdir(parents=True)
    quoted = textwrap.indent(f'"""{PROSE} Indented.\n\nSecond paragraph."""', "    ")
    (folder / "__init__.py").write_text(
        f'"""{PROSE} Of the module."""\nraise RuntimeError("imported")\nclass A:\n{quoted}\n    def f(self):\n'
        f'        """{PROSE * 2} Same start as the module, as numpy.ma and numpy have."""\n'
        '    async def g(self):\n        """Short."""\n'
    )
    (folder / "tests" / "a.py").write_text(f'"""{PROSE} In a test folder."""\n')
    (folder / "test_b.py").write_text(f'"""{PROSE} In a test file."""\n')
    (folder / "sparse.py").write_text(f'"""Sparse. {PROSE}"""\n' + "x = 1\n" * 3000)
    sys.path.insert(0, str(folder.parent))
    yield "some_prose"
    sys.path.remove(str(folder.parent))


def test_docstrings_are_found_without_importing(package):
    found = {name: text for name, text in documents([package]) if not name.startswith("reference/")}
    assert found == {f"{package}/__init__.py:1": f"{PROSE} Of the module."}
    assert package not in sys.modules


def test_the_language_reference_comes_first(package):
    names = [name for name, _ in documents([package])]
    assert names[0] == "reference/assert"
    assert len([name for name in names if name.startswith("reference/")]) > 60
    assert names == sorted(names, key=lambda name: not name.startswith("reference/"))


def test_prose_is_told_from_consoles_and_tables():
    assert is_prose(PROSE)
    assert not is_prose(PROSE[:200])
    assert not is_prose("\n".join([PROSE[:150]] * 2 + [">>> f(1, 2)"] * 2))
    assert not is_prose(PROSE + "\n" + "\n".join("| 1.25 | 3.75 | 12 |" for _ in range(40)))


def test_the_standard_packages_are_there_and_tested_files_are_not():
    """Stat calls only: reading all of it takes seconds and is measured by `python -m sepjax.bench.data`."""
    names = [name for name, _ in source_files(PACKAGES)]
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    assert not any("site-packages" in name or "/tests/" in name for name in names)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        list(source_files(["no_such_package"]))


def test_the_embedded_corpus_is_split_by_text(package, tmp_path):
    builder = Embedded(packages=[package], data_dir=tmp_path, file_format="array_record")
    assert Embedded(packages=[package], data_dir=tmp_path).data_path == builder.data_path
    assert Embedded(packages=[package, "absl"], data_dir=tmp_path).data_path != builder.data_path
    builder.download_and_prepare()
    splits = [list(PreparedTexts(str(builder.data_path), split, "text")) for split in ("train", "validation")]
    assert sorted([*splits[0], *splits[1]]) == sorted(text for _, text in documents([package]))
    assert sum(map(len, splits[0])) > 400_000  # the language reference
    assert any("Boolean" in text for text in splits[0])


def test_one_prepares_and_the_others_wait(tmp_path, capsys):
    order: list[str] = []

    def work(name: str) -> None:
        with exclusive(tmp_path / "new" / "thing"):
            order.append(f"{name} in")
            time.sleep(0.05)
            order.append(f"{name} out")

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.split()[0] for entry in order[::2]] == [entry.split()[0] for entry in order[1::2]]
    assert capsys.readouterr().err.count("waiting for another process") == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".thing.lock"]


def test_a_data_dir_that_cannot_be_written_is_an_os_error(corpus):
    with pytest.raises(OSError, match="/proc"):
        read(corpus, "/proc/data")


def test_a_full_disk_is_an_os_error_that_leaves_nothing(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(np.random.default_rng(0).bytes(400_000).hex())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # stands for a disk with no more room
    try:
        with pytest.raises(OSError, match=r"cannot write the corpus to .*text_folder.*write\(\) failed"):
            read(tmp_path / "texts", tmp_path / "data", "all")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "data").rglob("*array_record*"))
    assert len(read(tmp_path / "texts", tmp_path / "data", "all")) == 1


def test_an_interrupted_preparation_is_done_again(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    builder = TextFolder(path=tmp_path / "a.txt", hold_out=False, data_dir=tmp_path / "data")
    torn = builder.data_path.parent / "incomplete.ABCDEF_1.0.0"
    torn.mkdir(parents=True)
    (torn / "text_folder-train.array_record-00000-of-00001").write_bytes(b"half")
    assert list(read(tmp_path / "a.txt", tmp_path / "data", "all")) == ["text"]


def test_object_stores_need_no_lock():
    with exclusive("gs://bucket/data"):
        assert not Path("gs:").exists()
