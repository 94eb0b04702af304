"""Mixtures: rows of every source in their shares, resumed bit for bit, scored in the same shares; mistakes by name."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.config import ConfigError
from sepjax.data import reader
from sepjax.data.errors import DataError
from sepjax.data.mixture import Part, part_of_row, parts_of
from sepjax.data.pipeline import evaluation_batches, prepare_tokenizer, training_batches
from sepjax.data.sources import has_records, text_source
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation import inputs, jobs
from sepjax.evaluation.inputs import corpus_of, texts_of
from tests.data.test_pipeline import assert_same


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16 rows of 32 tokens."""
    monkeypatch.setattr(reader, "_BLOCK_TOKENS", 512)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A file of 30 records of figures alone; the corpus has none."""
    file = tmp_path_factory.mktemp("mixed, and * starred") / "digits.jsonl"
    rng = np.random.default_rng(1)
    file.write_text(
        "".join(json.dumps({"text": " ".join(map(str, rng.integers(10, 99, 20)))}) + "\n" for _ in range(30))
    )
    return file


@pytest.fixture
def mixed(config, with_data, corpus, digits, data_dir, tmp_path):
    """The corpus and three times as much of figures, with a tokenizer of both."""
    changed = with_data(name=f"{corpus}*0.5,{digits}*1.5")
    return changed, prepare_tokenizer(changed, data_dir, tmp_path / "tokenizer")


def share_of_figures(tokenizer, batches) -> float:
    """Of rows; every row is of one source."""
    rows = np.concatenate([batch.tokens for batch in batches])
    figures = [any(c.isdigit() for c in tokenizer.decode(row.tolist())) for row in rows]
    letters = [any(c.isalpha() for c in tokenizer.decode(row.tolist())) for row in rows]
    assert figures == [not x for x in letters]
    return float(np.mean(figures))


@given(weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=5), start=st.integers(0, 2**40))
def test_any_stretch_of_rows_has_the_shares(weights, start):
    parts = tuple(Part(str(i), w / sum(weights)) for i, w in enumerate(weights))
    rows = [part_of_row(start + i, parts) for i in range(200)]
    for number, part in enumerate(parts):
        # No interval had 200 points of this sequence more than 2.8 off its share, from any of 3,000 starts.
        assert abs(rows.count(number) - 200 * part.share) <= 4


def test_a_mixture_is_read_in_its_shares_and_resumed(mixed, data_dir):
    """Blocks end and epochs of the smaller source too; two processes share the same rows between them."""
    config, tokenizer = mixed
    original = training_batches(config, tokenizer, data_dir, seed=7)
    before = [next(original) for _ in range(45)]
    assert share_of_figures(tokenizer, before) == pytest.approx(0.75, abs=5 / 180)
    state = json.dumps(original.get_state())
    expected = [next(original) for _ in range(20)]
    original.close()
    other = training_batches(config, tokenizer, data_dir, seed=7)
    next(other)
    other.set_state(json.loads(state))
    for batch in expected:
        assert_same(next(other), batch)
    other.close()
    halves = []
    for index in range(2):
        iterator = training_batches(config, tokenizer, data_dir, seed=7, process_index=index, process_count=2)
        halves += [next(iterator) for _ in range(30)]
        iterator.close()
    assert {half.tokens.shape for half in halves} == {(2, 32)}
    assert share_of_figures(tokenizer, halves) == pytest.approx(0.75, abs=5 / 120)
    unequal = dataclasses.replace(config.data, name=config.data.name.replace("*1.5", "*0.5"))
    other = training_batches(dataclasses.replace(config, data=unequal), tokenizer, data_dir, seed=7)
    with pytest.raises(ConfigError, match=r"shares=0\.25, 0\.75, now 0\.5, 0\.5"):
        other.set_state(json.loads(state))
    other.close()


def test_a_mixture_is_scored_in_its_shares(mixed, data_dir):
    """One pass, to the end of the source that ends first; what processes see together is what one sees."""
    config, tokenizer = mixed
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_split="train"))
    alone = list(evaluation_batches(whole, tokenizer, data_dir))
    parts = [list(evaluation_batches(whole, tokenizer, data_dir, process_index=i, process_count=2)) for i in range(2)]
    assert len(alone) == len(parts[0]) == len(parts[1]) > 5
    for i, batch in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([part[i].tokens for part in parts]), batch.tokens)
    assert share_of_figures(tokenizer, alone[:-1]) == pytest.approx(0.75, abs=5 / (4 * len(alone) - 4))
    first = next(evaluation_batches(config, tokenizer, data_dir))
    assert first.loss_mask.any()


def test_a_run_is_scored_on_its_own_mixture(mixed, data_dir, tmp_path, monkeypatch, capsys):
    """Windows and streams have the shares of training's evaluation, and end with the source that ends first."""
    config, tokenizer = mixed
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=data_dir))
    texts = texts_of(tmp_path, config, tokenizer, "", "", 0)
    assert [(x.name, x.share) for x in texts] == [(part.name, part.share) for part in parts_of(config.data.name)]
    windows = jobs._windows(tokenizer, texts, config.data.sequence_length, start=tokenizer.document_start)
    figures = [any(c.isdigit() for c in tokenizer.decode(ids.tolist())) for ids in windows.ids]
    rows = [int(batch.loss_mask.any(axis=1).sum()) for batch in evaluation_batches(config, tokenizer, data_dir)]
    assert abs(len(windows.ids) - sum(rows)) <= 4  # rows have ends of documents besides, and several of them
    assert np.mean(figures) == pytest.approx(0.75, abs=1 / len(figures))
    assert figures == sorted(figures)
    assert "windows of the mixture" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(inputs, "load_config", lambda path: config)
    documents = corpus_of(tmp_path, "", tokenizer)
    sizes = {False: 0, True: 0}
    for document in documents:
        sizes[any(c.isdigit() for c in tokenizer.decode(document.targets.tolist()))] += len(document.inputs)
    assert sizes[True] / sum(sizes.values()) == pytest.approx(0.75, abs=0.02)
    few = corpus_of(tmp_path, "", tokenizer, max_tokens=40)
    assert sum(len(document.inputs) for document in few) == 40
    read, encode = [], Tokenizer.encode_flat
    with monkeypatch.context() as patch:  # of a large corpus no more is looked at
        patch.setattr(Tokenizer, "encode_flat", lambda self, texts: read.extend(texts) or encode(self, texts))
        assert len(corpus_of(tmp_path, "train", tokenizer, max_tokens=40)) == len(read) == 2
    (one,) = corpus_of(tmp_path, "", tokenizer, max_tokens=1)  # of which a quarter is none
    assert len(one.inputs) == 1


def test_names_may_have_commas_and_stars(digits, corpus, tmp_path, monkeypatch):
    assert parts_of(str(digits)) == ()
    assert parts_of("pg19") == ()
    assert [part.name for part in parts_of(f"{digits}*1,{corpus}*3")] == [str(digits), str(corpus)]
    assert [part.share for part in parts_of(f"{digits}*1,{corpus}*3")] == [0.25, 0.75]
    assert has_records(f"{digits}*1,{corpus}*3")
    (tmp_path / "embedded").mkdir()  # the name stays ours
    monkeypatch.chdir(tmp_path)
    assert not has_records(f"embedded*1,{corpus}*3")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a*1,b", "every source of a mixture needs its weight"),
        ("a*1,b*", "the weight of 'b' is '', expected a number above 0"),
        ("a*1,b*0", "the weight of 'b' is '0', expected a number above 0"),
        ("a*1,b*-1", "the weight of 'b' is '-1'"),
        ("a*1,b*nan", "the weight of 'b' is 'nan'"),
        ("a*1,b*half", "the weight of 'b' is 'half'"),
        ("a*1,./a/*2", "has 'a' twice"),
        ("a*1", "is a mixture of one source; leave its weight out"),
        ("a*1,recall*1", "'recall' has a vocabulary of its own"),
        ("nowhere*1,embedded*2", "'nowhere' is neither 'embedded'"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_in_a_line(name, message, with_data, tokenizer, data_dir):
    with pytest.raises(DataError, match=message) as error:
        training_batches(with_data(name=name), tokenizer, data_dir, seed=0)
    assert "\n" not in str(error.value)


def test_a_mixture_is_not_one_text(mixed, data_dir):
    with pytest.raises(DataError, match=r"is a mixture, which is not read as one text; name one of its sources"):
        text_source(mixed[0].data, data_dir, "train")
