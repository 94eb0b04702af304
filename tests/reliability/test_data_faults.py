"""Damaged records, empty splits, documents of any length: promise 6."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

from sepjax.config import Config
from sepjax.data.errors import DataError
from sepjax.data.pipeline import evaluation_batches, prepare_tokenizer, training_batches
from sepjax.data.sources import text_source
from sepjax.data.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """beartype looks at an item of every sequence that it checks: of a TextSource it would read a document."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory) -> tuple[Path, Tokenizer]:
    """A prepared corpus, not to be written to, and its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    return folder, prepare_tokenizer(tiny, str(folder), folder / "tokenizer")


@pytest.fixture
def broken(prepared, tmp_path) -> Callable[[str, Callable[[Path], object]], str]:
    """Copies the corpus, does something to the file of a split, and returns the folder."""

    def make(split: str, hurt: Callable[[Path], object]) -> str:
        folder = Path(shutil.copytree(prepared[0], tmp_path / "data"))
        (file,) = folder.rglob(f"*-{split}.array_record*")
        hurt(file)
        return str(folder)

    return make


def overwrite(start: int, size: int) -> Callable[[Path], None]:
    def hurt(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[start : start + size] = bytes(size)
        file.write_bytes(bytes(content))

    return hurt


def with_bad(config: Config, most: int) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_documents=most))


def take(config: Config, tokenizer: Tokenizer, folder: str, count: int) -> list:
    batches = training_batches(config, tokenizer, folder, seed=0)
    return [next(batches) for _ in range(count)]


def test_a_corrupt_record_is_named(tiny, prepared, broken):
    folder = broken("train", overwrite(1500, 200))
    message = r"document \d+ of text_folder/\w+/1.0.0:train cannot be read: Corrupted Riegeli.*max_bad_documents"
    with pytest.raises(DataError, match=message):
        take(tiny, prepared[1], folder, 1)


def test_corrupt_records_are_passed_over_counted_and_bounded(tiny, prepared, broken, caplog):
    folder = broken("train", overwrite(1500, 200))
    source = text_source(tiny.data, folder, "train")
    bad = [i for i in range(len(source)) if not is_readable(source, i)]
    assert 0 < len(bad) < len(source) // 2
    config = with_bad(tiny, len(bad))
    first = take(config, prepared[1], folder, 30)  # many epochs: each bad document counts once
    lines = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(lines) == len(bad)
    assert {int(line.split("document ")[1].split()[0]) for line in lines} == set(bad)
    assert lines[-1].startswith(f"passed over, {len(bad)} of at most {len(bad)}: document ")
    again = take(config, prepared[1], folder, 30)  # what is passed over depends on nothing but the files
    jax.tree.map(np.testing.assert_array_equal, first, again)
    with pytest.raises(DataError, match=f"data.max_bad_documents={len(bad) - 1} of them were passed over before"):
        take(with_bad(tiny, len(bad) - 1) if len(bad) > 1 else tiny, prepared[1], folder, 30)


def is_readable(source, index: int) -> bool:
    try:
        source[index]
    except DataError:
        return False
    return True


@pytest.mark.parametrize(
    ("hurt", "message"),
    [
        (lambda file: os.truncate(file, file.stat().st_size // 2), "cannot be read"),
        (lambda file: os.truncate(file, 0), "at least 64KB"),
        (lambda file: file.unlink(), "No such file"),
    ],
    ids=["truncated", "empty", "gone"],
)
def test_a_torn_file_of_a_split_is_named(tiny, prepared, broken, hurt, message):
    with pytest.raises(DataError, match=rf"document \d+ of text_folder/.*:train cannot be read: .*{message}|{message}"):
        take(tiny, prepared[1], broken("train", hurt), 1)


def test_the_evaluation_split_is_guarded_too(tiny, prepared, broken):
    folder = broken("validation", overwrite(70, 60))
    with pytest.raises(DataError, match="validation cannot be read"):
        list(evaluation_batches(tiny, prepared[1], folder))
    assert len(list(evaluation_batches(with_bad(tiny, 5), prepared[1], folder))) == 1


def test_a_damaged_description_of_a_dataset_is_an_error_and_no_crash(tiny, prepared, broken):
    folder = broken("train", lambda file: (file.parent / "dataset_info.json").write_text("{torn"))
    with pytest.raises(DataError, match=r"cannot read the dataset .*JSON.*prepared anew"):
        take(tiny, prepared[1], folder, 1)


def test_an_empty_split_is_named(tiny, prepared):
    empty = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, train_split="train[:0]"))
    with pytest.raises(DataError, match=r"split 'train\[:0\]' of text_folder/.* has no documents"):
        take(empty, prepared[1], str(prepared[0]), 1)
    empty = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, eval_split="validation[:0]"))
    with pytest.raises(DataError, match=r"split 'validation\[:0\]' of .* has no documents"):
        list(evaluation_batches(empty, prepared[1], str(prepared[0])))


def test_a_document_longer_than_every_block_is_read_to_its_end(tiny, prepared, tmp_path, monkeypatch):
    """One book of several blocks: its tokens come in order within rows, each once an epoch."""
    monkeypatch.setattr("sepjax.data.reader._BLOCK_TOKENS", 8 * 32 * 2)  # two batches
    book = "".join(f"The cat number {i} sat on the mat.\n" for i in range(1200))
    (tmp_path / "book.txt").write_text(book)
    data = dataclasses.replace(tiny.data, name=str(tmp_path / "book.txt"), train_split="all")
    config, tokenizer = dataclasses.replace(tiny, data=data), prepared[1]
    length = len(tokenizer.encode(book)) + 1  # inputs: BOS, and all but EOS
    assert length > 20 * 8 * 32
    batches = take(config, tokenizer, str(tmp_path / "data"), length // (2 * 8 * 32) * 2)  # whole blocks
    tokens = np.concatenate([batch.tokens.reshape(-1) for batch in batches])
    whole = np.array([tokenizer.bos_id, *tokenizer.encode(book)])
    assert sorted(map(tuple, tokens.reshape(-1, 32))) == sorted(map(tuple, whole[: len(tokens)].reshape(-1, 32)))
