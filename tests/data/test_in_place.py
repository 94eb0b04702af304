"""JSON lines that are read where they lie: the documents, splits and errors of a copy, from an index that is whole."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from sepjax.config import ConfigError, DataConfig
from sepjax.data import sources
from sepjax.data.corpora.rows import FileRows
from sepjax.data.errors import DataError
from sepjax.data.in_place import index, scanners, texts
from sepjax.data.in_place.scan import Piece, in_order
from sepjax.data.pipeline import evaluation_batches, evaluation_passes, training_batches
from sepjax.data.sources import PreparedTexts, text_source
from sepjax.files import WriteError
from tests.data.test_records import lines

TEXTS = [f"text {i} – {'é' * (i % 7)}\r\n{'x' * (i % 50)}" for i in range(150)]
GOOD = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS))
# A byte order mark, blank lines, spaces around records, both kinds of line ends, and no end of the last line.
ODD = b"\xef\xbb\xbf" + GOOD.replace("}\n{", "}  \r\n \t\r\n\n  {", 40).strip().encode()
BAD = [b'{"text": "caf\xe9"}', b'{"text": null}', b"{", b'{"text": "\\ud800"}', b"[1]", b'{"body": "b"}']


def read(name: Path, data_dir: Path, split: str = "train", **settings):
    return text_source(DataConfig(name=str(name), **settings), str(data_dir), split)


@pytest.fixture
def copied(monkeypatch):
    """Reads as an earlier version did, from a copy that it makes."""

    def read_copy(*args, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(sources, "lies_open", lambda rows: False)
            return read(*args, **settings)

    return read_copy


def test_what_is_read_is_what_a_copy_has(tmp_path, copied, caplog):
    """Splits too, and records that are left out: by their names, in their order."""
    folder = tmp_path / "a folder, é"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(ODD)
    (folder / "deeper" / "b.jsonl").write_bytes(b"\n".join(part for bad in BAD for part in (bad, lines([str(bad)]))))
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbfa text\r\n")
    (folder / "empty.jsonl").touch()
    (folder / "d.txt").write_bytes(b"caf\xe9")
    for split in ("train", "validation", "all"):
        names = []
        for data_dir, reads in ((tmp_path / "p", read), (tmp_path / "q", copied)):
            with pytest.raises(DataError) as error:
                reads(folder, data_dir, split, max_bad_documents=4)
            names.append(str(error.value))
            assert "and 4 before it were left out; correct it" in names[-1]
        assert split != "all" or names[0] == names[1]  # a copy reads its splits one after the other
        here, there = (
            x(folder, d, split, max_bad_documents=9) for x, d in ((read, tmp_path / "p"), (copied, tmp_path / "q"))
        )
        assert isinstance(there, PreparedTexts)
        assert isinstance(here, texts.TextsInPlace)
        assert sorted(here) == sorted(there)
        assert list(here) != sorted(here)  # a sample, wherever it is cut
    assert len(here) == len(TEXTS) + len(BAD) + 1
    with pytest.raises(DataError, match=r"and 4 before it"):  # what is indexed by now is not for this run
        read(folder, tmp_path / "p", max_bad_documents=4)
    halves = [read(folder, tmp_path / "p", f"train[{part}]", max_bad_documents=9) for part in (":50%", "50%:")]
    assert sorted([*halves[0], *halves[1]]) == sorted(read(folder, tmp_path / "p", max_bad_documents=9))
    for split, message in (
        ("test", "Unknown split 'test'.*it has the splits train"),
        ("train[:0]", "has no documents"),
    ):
        with pytest.raises(DataError, match=message):
            read(folder, tmp_path / "p", split, max_bad_documents=9)


def pieces_of(path: Path, size: int, most: int = 99) -> list[Piece]:
    whole = path.stat().st_size
    return [Piece(str(path), "lines", i, min(i + size, whole), 10, "text", True, most) for i in range(0, whole, size)]


def joined(found) -> tuple:
    """Entries, places of what is bad, lines and bytes, of all pieces together."""
    parts, before, bad = [b"", b""], 0, []
    for piece in found:
        parts = [a + b for a, b in zip(parts, piece.entries, strict=True)]
        bad += [(before + line, reason) for line, reason in piece.bad]
        before += piece.lines
    return *parts, bad, before


def test_pieces_of_any_size_hold_the_same(tmp_path):
    """In this process, and in others, in order; one that ends is an error."""
    (tmp_path / "a.jsonl").write_bytes(ODD + b"\n" + b"\n".join(BAD))
    whole = joined(in_order(pieces_of(tmp_path / "a.jsonl", 1 << 20)))
    assert len(whole[0]) > 16 * 140
    assert whole[1]
    assert len(whole[2]) == len(BAD)
    assert whole[3] == ODD.count(b"\n") + 1 + len(BAD)
    for size in (17, 1000):
        assert joined(in_order(pieces_of(tmp_path / "a.jsonl", size))) == whole
    assert joined(scanners.in_parallel(pieces_of(tmp_path / "a.jsonl", 700), 2)) == whole


def test_a_process_that_ends_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(["a", "b"]))
    monkeypatch.setattr(scanners, "_PROGRAM", "sepjax.data.errors")
    with pytest.raises(DataError, match=r"reads '.*a\.jsonl' has ended \(.*killed for memory"):
        list(scanners.in_parallel(pieces_of(tmp_path / "a.jsonl", 5), 2))


def test_a_file_that_changes_is_noticed_by_each_record(tmp_path):
    """One that grows is read on, whichever process opens it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    source = read(path, tmp_path / "p", "all")
    known = list(source)
    with path.open("ab") as file:
        file.write(lines(["more"]))
    _, arguments = source.__reduce__()
    assert list(texts.TextsInPlace(*arguments)) == list(source) == known
    assert len(read(path, tmp_path / "p", "all")) == len(known) + 1
    path.write_bytes(path.read_bytes().replace(b"text 7 ", b"text 9 "))  # as long as before
    seven = known.index(TEXTS[7])
    assert source.read([0, 1]) == known[:2]
    with pytest.raises(DataError, match=r"a\.jsonl changed since it was indexed: bytes .*are others, or gone; put the"):
        source.read([0, seven])
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.jsonl changed since it was indexed"):
        source.read([0])
    rows = FileRows(path)
    path.write_bytes(lines(TEXTS))
    with pytest.raises(DataError, match=r"a\.jsonl' changed while it was read: it had 0 bytes, now .*copy it"):
        index.write_index(tmp_path / "new", rows, "text", max_bad=0, hold_out=False)
    assert not (tmp_path / "new").exists()


def test_a_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_OPEN_FILES", 2)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS[:9]):
        (folder / f"{number}.jsonl").write_bytes(lines([text]))
    source, before = read(folder, tmp_path / "p", "all"), len(os.listdir("/proc/self/fd"))
    assert sorted(source) == sorted(TEXTS[:9])
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_place_in_a_copy_is_gone_on_with_or_refused(with_data, tokenizer, tmp_path, copied):
    """A run of an earlier version: its copy is used while it is there, and its order is never taken for another."""
    path, data_dir = tmp_path / "a.jsonl", tmp_path / "p"
    path.write_bytes(lines([f"The cat sat {'on a mat ' * i}." for i in range(40)]))
    config = with_data(name=str(path))
    new = training_batches(config, tokenizer, str(tmp_path / "q"), seed=7)
    copied(path, data_dir)
    old = training_batches(config, tokenizer, str(data_dir), seed=7)
    next(old)
    next(new)
    assert "read_from" not in old.get_state()["made_by"]
    again = training_batches(config, tokenizer, str(data_dir), seed=7)
    again.set_state(old.get_state())
    np.testing.assert_array_equal(next(again).tokens, next(old).tokens)
    with pytest.raises(ConfigError, match=r"read from copies, now from files: .*set data\.data_dir to the folder with"):
        new.set_state(old.get_state())
    with pytest.raises(
        ConfigError, match=r"read from files, now from copies: .*take the copy .* out of data\.data_dir"
    ):
        old.set_state(new.get_state())
    for iterator in (old, new, again):
        iterator.close()


def test_a_run_is_evaluated_on_what_was_there_when_it_began(with_data, tokenizer, tmp_path, capsys):
    """All its evaluations, without another index in its midst; the next start sees the file as it is then."""
    path, data_dir = tmp_path / "a.jsonl", str(tmp_path / "p")
    path.write_bytes(lines([f"The cat sat on mat {i}." for i in range(200)]))
    passes = evaluation_passes(with_data(name=str(path)), tokenizer, data_dir)
    before = [batch.tokens for batch in passes()]
    with path.open("ab") as file:
        file.write(lines([f"The dog sat on mat {i}." for i in range(2000)]))
    again = [batch.tokens for batch in passes()]
    np.testing.assert_array_equal(np.stack(again), np.stack(before))
    assert capsys.readouterr().err.count("indexing") == 1
    assert len(list(evaluation_batches(with_data(name=str(path)), tokenizer, data_dir))) > len(before)


def test_an_index_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_PIECE", 20_000)
    monkeypatch.setattr(index, "cores", lambda: 1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([str(i) for i in range(4_000)]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # stands for a disk with no more room
    try:
        with pytest.raises(WriteError, match=r"cannot write .*indexed.*; make room"):
            read(path, tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [x for x in (tmp_path / "p").rglob("*") if x.is_file() and x.stat().st_size]
    assert len(read(path, tmp_path / "p")) > 3_900
    (place,) = (tmp_path / "p" / "indexed").glob("*/train.entries")
    place.write_bytes(place.read_bytes()[:-16])
    with pytest.raises(DataError, match=r"cannot read the index in .*expected .*; remove it to have it made anew"):
        read(path, tmp_path / "p")
