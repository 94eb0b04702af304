"""Packed files, Parquet and folders of mixed kinds: all read, streamed, split for good; what is wrong is named."""

import gzip
import itertools
import json
import os
import re
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sepjax.config import DataConfig
from sepjax.data.corpora import room
from sepjax.data.corpora.rows import FileRows, records
from sepjax.data.corpora.splits import held_out, side_of
from sepjax.data.errors import DataError
from sepjax.data.sources import has_records, text_source
from sepjax.data.texts import TextSource

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstd = pytest.importorskip("zstandard")

TEXTS = [f"text {i}" for i in range(12)]


def read(name: Path, data_dir: Path, split: str = "all", form=None, **settings) -> TextSource:
    return text_source(DataConfig(name=str(name), **settings), str(data_dir), split, form)


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(path: Path, columns: dict, **settings) -> Path:
    pq.write_table(pa.table(columns), path, **settings)
    return path


class Plain:
    """Conversations as roles and contents."""

    train_on, key = "assistant", "plain"

    def __call__(self, messages, tools=()):
        return " ".join(f"{message['role']}: {message['content']}" for message in messages)


def test_all_kinds_in_one_folder_are_read_side_by_side(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines(TEXTS[:2]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[2:3])))
    frames = [zstd.compress(lines([text])) for text in TEXTS[3:6]]  # one after the other, as parallel packers write
    (folder / "c.jsonl.zst").write_bytes(b"".join(frames))
    parquet(folder / "deeper" / "d.parquet", {"id": [0, 1, 2], "text": TEXTS[6:9]}, row_group_size=2)
    (folder / "e.txt").write_bytes(b"\xef\xbb\xbf" + TEXTS[9].encode() + b"\r\nsecond line")
    (folder / "f.txt.gz").write_bytes(gzip.compress(TEXTS[10].encode()))
    (folder / "g.txt.zst").write_bytes(zstd.compress(TEXTS[11].encode()))
    (folder / "notes.md").write_text("not read")
    expected = sorted([*TEXTS[:9], TEXTS[9] + "\nsecond line", *TEXTS[10:]])
    assert has_records(str(folder))
    assert sorted(read(folder, tmp_path / "p")) == expected
    train, validation = (read(folder, tmp_path / "p", split) for split in ("train", "validation"))
    assert len(validation)
    assert sorted([*train, *validation]) == expected
    for name in "abcd":
        next(folder.rglob(f"{name}.*")).unlink()
    assert not has_records(str(folder))  # texts alone, packed or not
    assert sorted(read(folder, tmp_path / "p")) == expected[2:3] + expected[3:4] + expected[-1:]
    cut = [text for split in ("train", "validation") for text in read(folder / "g.txt.zst", tmp_path / "p", split)]
    assert len(cut) == 2
    assert "".join(cut) == TEXTS[11]


def test_parquet_is_as_json_lines_are(tmp_path):
    """Texts of any type and conversations; what is changed is another dataset, and what is not is prepared once."""
    path, prepared = tmp_path / "a.parquet", tmp_path / "p"
    parquet(path, {"text": TEXTS, "body": [text.encode() for text in TEXTS], "big": pa.array(TEXTS, pa.large_string())})
    names = set()
    for key in ("text", "body", "big", "text"):
        source = read(path, prepared, text_key=key)
        assert sorted(source) == sorted(TEXTS)
        names.add(source.name)
    assert len(names) == 3
    stat = path.stat()
    parquet(path, {"text": [text.replace("text", "word") for text in TEXTS]})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert sorted(read(path, prepared)) == sorted(text.replace("text", "word") for text in TEXTS)
    turns = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "b"}]
    parquet(path, {"messages": [turns, turns[:1], None], "id": [1, 2, 3]})
    with pytest.raises(DataError, match=r"a\.parquet: row group 0, row 1: no message is an assistant's"):
        read(path, prepared, form=Plain())
    source = read(path, prepared, form=Plain(), max_bad_documents=2)
    assert source.conversations
    assert list(source) == ["user: a assistant: b"]
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match=r"has conversations, and b\.txt beside them: keep them apart"):
        read(tmp_path, tmp_path / "other", form=Plain())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([b"fine", b"fine too", b"\xff", b"d"]), r"row group 1, row 0: 'text' is not UTF-8 text: .* byte 0"),
        (pa.array(["a", None, "c", "d"]), r"row group 0, row 1: it has no 'text', as records before it have"),
        (pa.array(["a", "b", "c", "\ufdd2"]), r"row group 1, row 1: 'text' has U\+FDD2 or U\+FDD3"),
    ],
)
def test_bad_rows_are_named_and_bounded(values, message, tmp_path, caplog):
    path = parquet(tmp_path / "a.parquet", {"text": values}, row_group_size=2)
    with pytest.raises(DataError, match=r"a\.parquet: " + message + r".*data\.max_bad_documents=1"):
        read(path, tmp_path / "p")
    assert len(read(path, tmp_path / "p", max_bad_documents=1)) == 3
    assert "a record is left out, 1 of at most 1" in caplog.text


def test_texts_among_records_are_bad_ones_by_name(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "texts" / "b.txt").write_bytes(b"caf\xe9s")
    (tmp_path / "texts" / "c.txt").write_bytes(b" \n")
    with pytest.raises(DataError, match=r"b\.txt: it is not UTF-8 text: .*byte 3"):
        read(tmp_path / "texts", tmp_path / "p")
    with pytest.raises(DataError, match=r"c\.txt: it is empty, and 1 before it were left out"):
        read(tmp_path / "texts", tmp_path / "p", max_bad_documents=1)
    assert sorted(read(tmp_path / "texts", tmp_path / "p", max_bad_documents=2)) == sorted(TEXTS)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    def fails(path: Path, content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(path, tmp_path / "p", max_bad_documents=9)

    packed, table = zstd.compress(lines(TEXTS)), parquet(tmp_path / "a.parquet", {"text": TEXTS}).read_bytes()
    fails(tmp_path / "a.jsonl.zst", packed[:-3], r"cannot read '.*a\.jsonl\.zst': it ends within a frame of zstd")
    fails(tmp_path / "b.jsonl.zst", packed + b"junk", r"cannot read '.*b\.jsonl\.zst': damaged")
    fails(tmp_path / "c.txt.gz", gzip.compress(b"text" * 99)[:-9], r"cannot read '.*c\.txt\.gz'")
    fails(tmp_path / "d.parquet", table[:-1], r"cannot read row group 0 of '.*d\.parquet'")
    fails(tmp_path / "e.parquet", table[:4] + bytes(40) + table[44:], r"cannot read row group 0 of '.*e\.parquet'")
    named = parquet(tmp_path / "a.parquet", {"name": TEXTS, "text": TEXTS}).read_bytes().replace(b"name", b"n\xffme")
    fails(tmp_path / "f.parquet", named, r"cannot read row group 0 of '.*f\.parquet'")
    (tmp_path / "a.parquet").write_bytes(table)
    for key, expected in (("story", "'messages', .* or 'story'"), ("id", r"'messages'.* or 'id'")):
        with pytest.raises(DataError, match=rf"a\.parquet' has the columns 'text', expected {expected}"):
            read(tmp_path / "a.parquet", tmp_path / "p", text_key=key)
    for library, name in (("zstandard", "a.jsonl.zst"), ("pyarrow.parquet", "a.parquet")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(DataError, match=rf'{name}.* is missing: pip install "sepjax\[data\]"'):
            read(tmp_path / name, tmp_path / "p")


def test_a_copy_says_what_room_it_takes(tmp_path, monkeypatch, capsys):
    """Before it begins, from what the first files unpack to; and what has not the room, or changes, is not made."""
    texts, prepared = ["a text " * 100 + str(i) for i in range(1000)], tmp_path / "p"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(texts)))
    parquet(tmp_path / "b.parquet", {"id": list(range(1000)), "text": texts}, compression="none", use_dictionary=False)
    read(tmp_path / "a.jsonl.gz", prepared)
    said = capsys.readouterr().err
    assert re.search(
        r"copying a file of 0\.1 MB into .*records.* \(once; 0\.7 MB at most\): a\.jsonl\.gz cannot be", said
    )
    sizes = [room.unpacked_bytes([tmp_path / name], "text") for name in ("a.jsonl.gz", "b.parquet")]
    assert sizes[0] == len(lines(texts))
    assert 0.99 < sizes[1] / sum(map(len, texts)) < 1.02
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(
        DataError, match=r"takes about 0\.7 MB in .*, where 0\.1 MB are free; set data\.data_dir .*\.jsonl"
    ):
        read(tmp_path / "b.parquet", prepared)
    monkeypatch.undo()
    for file in sorted(tmp_path.glob("?.*")):
        told, rows = [], FileRows(file)
        rows.told = told.append
        assert len(list(rows.records("text"))) == 1000
        assert len(told) > 3
        assert 0.98 * file.stat().st_size < sum(told) <= file.stat().st_size
    os.utime(tmp_path / "b.parquet", ns=(0, 0))
    with pytest.raises(DataError, match=r"b\.parquet' changed while it was read"):
        list(rows.records("text"))
    assert not list(prepared.glob("records/*/incomplete*"))


def test_large_files_are_streamed(tmp_path):
    """Files of 8 MB in records of 1 kB, of which a few are held at a time."""
    rng = np.random.default_rng(0)
    with zstd.open(tmp_path / "a.jsonl.zst", "wb") as file:
        for _ in range(8):
            file.write(lines([rng.bytes(500).hex() for _ in range(1000)]))
    letters = [f"{i:06}{'x' * 1000}" for i in range(8_000)]
    parquet(tmp_path / "b.parquet", {"text": letters}, row_group_size=8_000, use_dictionary=False, compression="none")
    tracemalloc.start()
    count = sum(1 for _ in records([tmp_path / "a.jsonl.zst"], "text"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8_000
    assert peak < 2e6
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in records([tmp_path / "b.parquet"], "text", "text")]
    assert len(held) == 8_000
    assert max(held) < 4e6


def test_a_split_asks_for_no_more_keys_than_it_needs():
    keys = map(str, itertools.count())
    side = side_of(keys)
    assert side is not None
    assert int(next(keys)) < 1000
    assert {key for key in map(str, range(3000)) if side(key)} == held_out([str(i) for i in range(3000)])
    assert side_of([]) is side_of(["a", "a"]) is None
