"""Batches: every document once an epoch on one host, the same bits after a restore, finite evaluation, clear errors."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepjax.bench.data import measure
from sepjax.config import Config, ConfigError
from sepjax.data import reader as reader_module
from sepjax.data.batch import Batch
from sepjax.data.errors import DataError
from sepjax.data.mixed_reader import joined
from sepjax.data.packing import TokenStream, pack_rows
from sepjax.data.pipeline import evaluation_batches, prepare_tokenizer, training_batches
from sepjax.data.reader import BatchReader, Shard
from sepjax.data.sources import text_source
from sepjax.data.tokenizer import Tokenizer
from sepjax.separators import configured_table, flag_separators

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks of 4 batches of 4 x 32 tokens, so that tests cross their borders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "_BLOCK_TOKENS", 512)
        yield


@pytest.fixture
def batches(config, tokenizer, data_dir) -> Iterator[grain.DatasetIterator]:
    iterator = training_batches(config, tokenizer, data_dir, seed=7)
    yield iterator
    iterator.close()


def assert_same(a: Batch, b: Batch) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def rows_of(batches: list[Batch]) -> Counter[bytes]:
    return Counter(row.tobytes() for batch in batches for row in np.concatenate([batch.tokens, batch.targets], axis=1))


@given(
    num_documents=st.integers(1, 60), count=st.integers(1, 8), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 3)
)
def test_every_epoch_gives_every_document_to_one_reader(num_documents, count, seed, epoch):
    shards = [
        Shard(num_documents, index, min(count, num_documents), seed) for index in range(min(count, num_documents))
    ]
    taken = [shard[i + epoch * len(shard)] for shard in shards for i in range(len(shard))]
    assert sorted(taken) == list(range(num_documents))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed: int, epoch: int) -> list[int]:
        return [Shard(100, 0, 1, seed)[i + 100 * epoch] for i in range(100)]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed, epoch in ((1, 0), (9, 0), (1, 1), (1, 2))}) == 4
    assert order(1, 0) != sorted(order(1, 0))


def test_batches_are_the_documents_packed_and_mixed(config, tokenizer, data_dir):
    """Three epochs of them against a plain packing of the shard's documents in order, block by block."""
    source = text_source(config.data, data_dir, "train")
    shard = Shard(len(source), 0, 1, seed=3)
    table = configured_table(tokenizer, config.attention)

    def flag(tokens, positions):
        return flag_separators(tokens, positions, table, config.attention)

    texts = [source[shard[i]] for i in range(3 * len(source))]
    stream = TokenStream.encode(tokenizer, texts)
    expected = pack_rows(stream, 32, flag)
    iterator = iter(BatchReader(source, tokenizer, flag, shard, rows=4, length=32))
    for block in range(len(stream) // 512):
        rows = jax.tree.map(lambda x, block=block: x[16 * block : 16 * block + 16], expected)
        dealt = [next(iterator) for _ in range(4)]
        assert rows_of(dealt) == rows_of([rows])
        assert any(not np.array_equal(dealt[i].tokens, rows.tokens[4 * i : 4 * i + 4]) for i in range(4))
        for name in ("positions", "segment_ids", "is_separator", "loss_mask"):
            both = [np.concatenate([getattr(b, name) for b in dealt]), getattr(rows, name)]
            assert Counter(row.tobytes() for row in both[0]) == Counter(row.tobytes() for row in both[1])


def test_separators_are_flagged(config, tokenizer, batches):
    batch = next(batches)
    texts = tokenizer.token_texts()
    for token, flag in zip(batch.tokens.ravel(), batch.is_separator.ravel(), strict=True):
        assert flag == (texts[token] is not None and not texts[token].strip(" .,?!;:\n\t"))
    assert batch.is_separator.any()
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == batch.segment_ids.dtype == np.int32


def test_what_a_run_is_scored_on_must_be_somewhere(config, tokenizer, data_dir):
    def batch(loss_on):
        data = dataclasses.replace(config.data, loss_on=loss_on)
        return next(training_batches(dataclasses.replace(config, data=data), tokenizer, data_dir, seed=3))

    scored = batch("e").loss_mask
    assert 0 < scored.sum() < scored.size
    with pytest.raises(DataError, match=r"data.loss_on='nowhere at all' matches nothing in .* tokens of "):
        batch("nowhere at all")


def test_processes_share_the_documents(config, tokenizer, data_dir):
    """Each its rows of a batch; the first block of each holds only documents of its shard."""
    source = text_source(config.data, data_dir, "train")
    for index in range(2):
        iterator = training_batches(config, tokenizer, data_dir, seed=7, process_index=index, process_count=2)
        first = [next(iterator) for _ in range(8)]
        iterator.close()
        shard = Shard(len(source), index, 2, seed=7)
        stream = TokenStream.encode(tokenizer, [source[shard[i]] for i in range(2 * len(shard))])
        assert first[0].tokens.shape == (2, 32)
        expected = pack_rows(stream[: 16 * 32], 32, lambda tokens, positions: tokens < 0)
        assert rows_of(first) == rows_of([expected])


@settings(max_examples=settings.default.max_examples // 4)
@given(before=st.integers(0, 50), between=st.integers(0, 6))
def test_a_restored_iterator_goes_on_bit_for_bit(config, tokenizer, data_dir, before, between):
    """From anywhere in a block (4 batches) or in three epochs, with the thread reading ahead; the state is JSON."""
    original = training_batches(config, tokenizer, data_dir, seed=7)
    for _ in range(before):
        next(original)
    state = json.dumps(original.get_state())
    expected = [next(original) for _ in range(6)]
    other = training_batches(config, tokenizer, data_dir, seed=7)
    for _ in range(between):  # a restored iterator may have been used
        next(other)
    other.set_state(json.loads(state))
    assert other.get_state() == json.loads(state)
    for batch in expected:
        assert_same(next(other), batch)
    assert other.get_state() == original.get_state()
    original.close()
    other.close()


def test_a_place_reached_otherwise_is_refused(config, with_data, tokenizer, data_dir, batches):
    state = batches.get_state()
    other = training_batches(with_data(sequence_length=16), tokenizer, data_dir, seed=8)
    before = other.get_state()
    with pytest.raises(ConfigError, match="sequence_length=32, now 16; seed=7, now 8"):
        other.set_state(state)
    assert other.get_state() == before
    other.close()


def test_other_numbers_of_processes_go_on_with_the_same_batches(config, tokenizer, data_dir):
    """Two become one, which becomes four, which become two again: rows and their order stay, to the end of a block."""

    def shares(count):
        return [
            training_batches(config, tokenizer, data_dir, seed=7, process_index=i, process_count=count)
            for i in range(count)
        ]

    def take(readers):
        return joined([next(reader) for reader in readers])

    old = shares(2)
    for _ in range(5):
        take(old)
    states = [json.loads(json.dumps(reader.get_state())) for reader in old]
    for count in (1, 4, 2, 2):
        new = shares(count)
        for reader in new:
            reader.set_states(states)
        for _ in range(3):
            assert_same(take(new), take(old))
        states = [json.loads(json.dumps(reader.get_state())) for reader in new]
        for reader, state in zip(new, states, strict=True):  # and starts again as it was
            reader.set_state(state)
            assert reader.get_state() == state
        for reader in new:
            reader.close()
    with pytest.raises(ValueError, match="lacks the place in the data of process 1 of 2"):
        shares(1)[0].set_states(states[:1])
    with pytest.raises(ConfigError, match="seed=7, now 8"):
        training_batches(config, tokenizer, data_dir, seed=8).set_states(states)
    larger = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8))
    with pytest.raises(ConfigError, match="is of batches of 4 rows, now 8"):
        training_batches(larger, tokenizer, data_dir, seed=7).set_states(states)


WORKERS = """
import json, sys
from absl import app

def resumes(corpus, data_dir, tokenizer, num_workers):
    from sepjax.config import Config, DataConfig, ModelConfig
    from sepjax.data.pipeline import training_batches
    from sepjax.data.tokenizer import Tokenizer
    config = Config(model=ModelConfig(vocab_size=400),
                    data=DataConfig(name=corpus, sequence_length=32, batch_size=4, num_workers=num_workers))
    tokenizer = Tokenizer.load(tokenizer)
    first = training_batches(config, tokenizer, data_dir, seed=7)
    for _ in range(70):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first) for _ in range(5)]
    second = training_batches(config, tokenizer, data_dir, seed=7)
    second.set_state(state)
    for batch in expected:
        again = next(second)
        assert (again.tokens == batch.tokens).all() and (again.positions == batch.positions).all()
    print("rows", sum(len(batch.tokens) for batch in expected))
    first.close(), second.close()

def main(argv):
    resumes(*argv[1:4], int(argv[4]))

if __name__ == "__main__":
    app.run(main)
"""


LEFT_OPEN = """
import grain
from sepjax.data.labelled import Labelled

def share(index, count):
    numbers = grain.MapDataset.range(10**9).to_iter_dataset()
    return grain.experimental.ThreadPrefetchIterDataset(numbers, prefetch_buffer_size=4)

batches = iter(Labelled(share, {"process_index": 0, "process_count": 1}))
print(next(batches))
"""


def test_a_program_may_leave_batches_open():
    """The thread that reads ahead used to abort the process at its end, or to fill its log."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LEFT_OPEN]
    done = subprocess.run(command, env=environment, timeout=240, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


# Each process imports for three seconds, those of a restored iterator too.
@pytest.mark.parametrize(
    ("kind", "num_workers"), [("lines", 1), *(pytest.param(x, 2, marks=pytest.mark.soak) for x in ("lines", "hub"))]
)
def test_worker_processes_resume_too(kind, num_workers, corpus, data_dir, tokenizer, tmp_path):
    """Those of a mixture, which has what one source has; a run with a reader of one source is in test_wheel.py."""
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "program.py").write_text(textwrap.dedent(WORKERS))
    texts = [f"The cat sat {'on a mat ' * i}." for i in range(20)]
    if kind == "hub":  # whose library takes each process two seconds to import
        pytest.importorskip("datasets").Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "more")
        name = f"{corpus}*3,hf://{tmp_path / 'more'}*1"
    else:
        (tmp_path / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        name = f"{corpus}*3,{tmp_path / 'more.jsonl'}*1"
    command = [sys.executable, str(tmp_path / "program.py"), name, data_dir, str(tmp_path / "tokenizer")]
    command += [str(num_workers)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    here = tmp_path / "here"  # whatever lies there
    here.mkdir()
    (here / "socket.py").write_text("raise SystemExit(9)")
    streams = {"capture_output": True, "text": True, "cwd": here}
    done = subprocess.run(command, env=environment, timeout=240, check=False, **streams)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == ["rows 20"]
    assert "leaked" not in done.stderr  # of batches that were made ahead


@pytest.mark.parametrize("split", ["train", "validation"])
def test_evaluation_is_one_pass(config, with_data, tokenizer, data_dir, split):
    batches = list(evaluation_batches(with_data(eval_split=split), tokenizer, data_dir))
    stream = TokenStream.encode(tokenizer, list(text_source(config.data, data_dir, split)))
    assert {batch.tokens.shape for batch in batches} == {(4, 32)}
    assert len(batches) == -(-len(stream) // 128)
    assert np.concatenate([b.tokens[b.loss_mask] for b in batches]).tolist() == stream.tokens.tolist()
    assert np.concatenate([b.targets[b.loss_mask] for b in batches]).tolist() == stream.targets.tolist()
    assert not batches[-1].is_separator[~batches[-1].loss_mask].any()
    assert not batches[-1].segment_ids[~batches[-1].loss_mask].any()
    for batch, again in zip(batches, evaluation_batches(with_data(eval_split=split), tokenizer, data_dir), strict=True):
        assert_same(batch, again)


def test_evaluation_rows_do_not_depend_on_the_number_of_processes(with_data, tokenizer, data_dir):
    whole = with_data(eval_split="train")
    alone = list(evaluation_batches(whole, tokenizer, data_dir))
    parts = [list(evaluation_batches(whole, tokenizer, data_dir, process_index=i, process_count=4)) for i in range(4)]
    assert {len(part) for part in parts} == {len(alone)}
    for i, batch in enumerate(alone):
        assert_same(jax.tree.map(lambda *rows: np.concatenate(rows), *(part[i] for part in parts)), batch)


def test_a_batch_larger_than_the_corpus_repeats_it_and_says_so(with_data, tokenizer, data_dir, caplog):
    iterator = training_batches(with_data(batch_size=512), tokenizer, data_dir, seed=7)
    assert next(iterator).tokens.shape == (512, 32)
    iterator.close()
    assert "less than one batch of 512 rows of 32" in caplog.text


def test_documents_without_tokens_are_an_error(with_data, tmp_path, tokenizer):
    """Single characters under a vocabulary without BOS and EOS: no pair of tokens, and no endless search for one."""
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("a")
    tokenizer = Tokenizer(tokenizer._model)
    tokenizer.bos_id = tokenizer.eos_id = None
    blank = with_data(name=str(tmp_path / "texts"))
    with pytest.raises(DataError, match="no tokens in the 2 documents"):
        next(training_batches(blank, tokenizer, str(tmp_path / "data"), seed=0))
    with pytest.raises(DataError, match="no tokens to evaluate on"):
        next(evaluation_batches(blank, tokenizer, str(tmp_path / "data")))


def test_settings_that_do_not_fit_are_refused(config: Config, with_data, tokenizer, data_dir):
    small = Config(model=type(config.model)(vocab_size=399), data=config.data)
    for make in (training_batches, evaluation_batches):
        seed = {"seed": 0} if make is training_batches else {}
        with pytest.raises(ConfigError, match=r"tokenizer has 400 tokens but model.vocab_size=399"):
            next(make(small, tokenizer, data_dir, **seed))
        with pytest.raises(ConfigError, match=r"batch_size=4 must be a multiple of the 3 processes"):
            next(make(config, tokenizer, data_dir, process_count=3, **seed))
    with pytest.raises(ConfigError, match=r"documents for 2 processes of 30 readers"):
        training_batches(with_data(num_workers=30), tokenizer, data_dir, seed=0, process_count=2)


def test_a_tokenizer_is_trained_once_and_kept(config, data_dir, tmp_path):
    first = prepare_tokenizer(config, data_dir, tmp_path / "run" / "tokenizer")
    file = tmp_path / "run" / "tokenizer" / "tokenizer.model"
    written = file.stat()
    second = prepare_tokenizer(config, data_dir, tmp_path / "run" / "tokenizer")
    assert file.stat() == written
    assert first.vocab_size == 400
    assert second.encode("the cat sat.") == first.encode("the cat sat.")


def test_an_empty_folder_of_an_interrupted_run_is_no_tokenizer(config, data_dir, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model.1.partial").write_bytes(b"half")
    assert prepare_tokenizer(config, data_dir, tmp_path / "tokenizer").vocab_size == 400


def test_a_named_tokenizer_is_copied(config, with_data, tokenizer, data_dir, tmp_path):
    tokenizer.save(tmp_path / "mine")
    named = with_data(tokenizer=str(tmp_path / "mine" / "tokenizer.model"))
    prepare_tokenizer(named, data_dir, tmp_path / "run")
    (tmp_path / "mine" / "tokenizer.model").unlink()
    assert prepare_tokenizer(named, data_dir, tmp_path / "run").encode("a cat") == tokenizer.encode("a cat")


def test_a_damaged_tokenizer_is_an_error_not_a_reason_to_train(config, data_dir, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00not a model")
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        prepare_tokenizer(config, data_dir, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == b"\x00not a model"


@pytest.mark.soak  # a measurement of what is tested above
def test_the_bench_measures(config, data_dir):
    rates = measure(config, data_dir, seconds=0.05)
    assert rates["tokens_per_second"] > 0
    assert rates["tokens_per_cpu_second"] > 0
    assert rates["seconds"] >= 0.05
