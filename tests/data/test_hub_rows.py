"""Datasets that `datasets` reads or has saved: rows where they lie, resumed bit for bit, mixed; mistakes by name."""

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from sepjax.config import DataConfig
from sepjax.data import reader
from sepjax.data.errors import DataError
from sepjax.data.pipeline import evaluation_batches, training_batches
from sepjax.data.sources import has_records, text_source
from sepjax.data.texts import BadDocuments, TextSource
from tests.data.conftest import sentences
from tests.data.test_pipeline import assert_same
from tests.data.test_records import Plain

datasets = pytest.importorskip("datasets")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(3)
    return [sentences(rng, int(rng.integers(1, 9))) for _ in range(40)]


@pytest.fixture(scope="module")
def saved(texts, tmp_path_factory) -> Path:
    """What `save_to_disk` writes: 36 rows of train in two files, 4 of validation; a column that is no text."""
    folder = tmp_path_factory.mktemp("saved")
    rows = {"id": list(range(40)), "text": texts, "raw": [text.encode() for text in texts]}
    whole = datasets.Dataset.from_dict(rows)
    parts = datasets.DatasetDict(train=whole.select(range(36)), validation=whole.select(range(36, 40)))
    parts.save_to_disk(folder / "set", num_shards={"train": 2, "validation": 1})
    return folder / "set"


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Blocks of 16 rows of 32 tokens; a cache of this test's own; no network."""
    monkeypatch.setattr(reader, "_BLOCK_TOKENS", 512)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def read(name: object, data_dir: object, split: str = "train", form=None, **settings) -> TextSource:
    return text_source(DataConfig(name=f"hf://{name}", **settings), str(data_dir), split, form)


def test_rows_are_read_where_they_lie(saved, texts, tmp_path):
    train = read(saved, tmp_path / "p")
    assert list(train) == texts[:36]
    assert train.read([35, 0, 35]) == [texts[35], texts[0], texts[35]]
    assert pickle.loads(pickle.dumps(train))[7] == texts[7]  # how Grain hands it to its workers
    assert len(pickle.dumps(train)) < 4000  # paths, no texts
    assert train.bytes_per_document == pytest.approx(np.mean([len(x) for x in texts[:36]]), rel=0.1)
    assert not train.conversations
    assert list(read(saved, tmp_path / "p", "train[50%:]+validation[:1]")) == [*texts[18:36], texts[36]]
    assert list(read(saved, tmp_path / "p", "all", text_key="raw")) == texts
    names = {read(saved, tmp_path / "p", split).name for split in ("train", "train[:9]", "validation")}
    assert len(names) == 3
    assert not (tmp_path / "p").exists()
    assert not (tmp_path / "cache").exists()
    assert has_records(f"hf://{saved}")


def test_files_that_datasets_takes_are_read_too(texts, tmp_path, monkeypatch, capsys):
    """Once into its cache; a folder beside the working one."""
    (tmp_path / "mine").mkdir()
    lines = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts)
    (tmp_path / "mine" / "train.jsonl").write_text(lines)
    datasets.Dataset.from_dict({"body": texts[:2], "n": [1, 1]}).to_parquet(tmp_path / "other.parquet")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert list(read("./mine", tmp_path / "p", text_key="body")) == texts
    assert capsys.readouterr().err.count("(once)") == 1
    (tmp_path / "mine" / "train.jsonl").rename(tmp_path / "mine" / "train.txt")
    (tmp_path / "mine" / "train.txt").write_text("one\ntwo\n")
    assert list(read("./mine", tmp_path / "p")) == ["one", "two"]  # as datasets has it: a line a row
    (tmp_path / "mine" / "train.txt").rename(tmp_path / "mine" / "a.tar")
    with pytest.raises(DataError, match=r"is made of 'webdataset' files, which are not read; expected one of arrow"):
        read("./mine", tmp_path / "p")


def test_resuming_is_exact_alone_and_in_mixtures(saved, texts, config, corpus, tokenizer, data_dir):
    """Blocks and epochs end. With worker processes: tests/data/test_pipeline.py."""
    for name in (f"hf://{saved}", f"hf://{saved}*1,{corpus}*1"):
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, name=name))
        original = training_batches(changed, tokenizer, data_dir, seed=7)
        for _ in range(21):
            next(original)
        state = json.dumps(original.get_state())
        expected = [next(original) for _ in range(9)]
        original.close()
        other = training_batches(changed, tokenizer, data_dir, seed=7)
        other.set_state(json.loads(state))
        for batch in expected:
            assert_same(next(other), batch)
        other.close()
        scored = list(evaluation_batches(changed, tokenizer, data_dir))
        assert scored[0].loss_mask.any()
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, name=f"hf://{saved}"))
    scored = evaluation_batches(alone, tokenizer, data_dir)
    tokens = np.concatenate([batch.targets[batch.loss_mask] for batch in scored])
    assert tokenizer.decode(tokens.tolist()).split() == "".join(texts[36:]).split()


def test_conversations_are_written_once_by_the_template(tmp_path):
    rows = {"id": [1, 2, 3], "messages": [TURNS, TURNS[:1], TURNS], "text": ["x", "y", "z"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"hf://.*set:train, row 1: no message is an assistant's.*max_bad_documents=1"):
        read(tmp_path / "set", tmp_path / "p", form=Plain())
    source = read(tmp_path / "set", tmp_path / "p", form=Plain(), max_bad_documents=1)
    assert source.conversations
    assert sorted(source) == ["user: a assistant: b"] * 2
    assert len(read(tmp_path / "set", tmp_path / "p", "train[2:]", form=Plain())) == 1
    with pytest.raises(DataError, match="has conversations, but the model's tokenizer has no chat template"):
        read(tmp_path / "set", tmp_path / "p")


def test_bad_rows_are_named_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # beartype would read a row, see test_data_faults.py
    pa = pytest.importorskip("pyarrow")
    values = pa.chunked_array([pa.array(["fine", None, "\ufdd2"]), pa.array([b"\xff"]).view(pa.string())])
    datasets.Dataset(pa.table({"text": values})).save_to_disk(tmp_path / "set")
    source = read(tmp_path / "set", tmp_path / "p")
    for index, message in ((1, "it has no 'text'"), (2, r"U\+FDD2"), (3, r"cannot be read: 'utf-?8' codec.*anew")):
        with pytest.raises(DataError, match=rf"document {index} of hf://.*set:train \(\w+\).*{message}"):
            source.read([0, index])
    bad = BadDocuments(3)
    assert bad.read(source, range(4)) == ["fine", "", "", ""]
    with pytest.raises(DataError, match=r"data\.max_bad_documents=2 of them were passed over before"):
        BadDocuments(2).read(source, range(4))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("owner", {}, r"data.name='hf://owner', expected hf://OWNER/NAME or .*@REVISION.*hf://\./RELATIVE"),
        ("./nowhere", {}, "data.name='hf://./nowhere': there is no folder '/.*nowhere'"),
        ("owner/name@v1", {}, "cannot read 'hf://owner/name@v1': .*owner/name"),
        ("SAVED", {"split": "test"}, r"cannot read split 'test' of hf://.*: it has the splits train, validation$"),
        ("SAVED", {"split": "train[40:30]"}, r"cannot read split 'train\[40:30\]'|has no rows"),
        (
            "SAVED",
            {"text_key": "story"},
            r"no text field 'story'; .*'text', 'raw'; .* other fields 'id' \(int64\)",
        ),
        ("SAVED", {"text_key": "id"}, "no text field 'id'; set data.text_key to one of its texts: 'text', 'raw'"),
        ("SAVED", {"train_on": "all"}, "data.train_on='all' does nothing for 'hf://.*', which has no conversations"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(name, settings, message, saved, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        read(name.replace("SAVED", str(saved)), tmp_path / "p", **settings)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(saved, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=rf"was saved by datasets: --config.data.name=hf://{saved}"):
        text_source(DataConfig(name=str(saved)), str(tmp_path), "train")
    datasets.load_from_disk(str(saved / "validation")).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match=r"train_split='train\[1%:\]' and data.eval_split='train\[:1%\]'"):
        read(tmp_path / "one", tmp_path / "p", "validation")
    with monkeypatch.context() as patch:  # an older one would run code of the dataset
        patch.setattr(datasets, "__version__", "3.6.0")
        with pytest.raises(DataError, match=r"datasets 4 or newer, and 3\.6\.0 is installed: pip install --upgrade"):
            read(saved, tmp_path / "p")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'is read by datasets, which is missing: pip install "sepjax\[hf\]"'):
        read(saved, tmp_path / "p")
