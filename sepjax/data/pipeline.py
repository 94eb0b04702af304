"""What a run reads: its tokenizer, endless training batches and finite evaluation batches, each host its own rows."""

import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
from etils import epath

from sepjax import children, interrupt
from sepjax.config import Config, ConfigError
from sepjax.data.batch import Batch
from sepjax.data.conversations import Form
from sepjax.data.corpora.recall.recall import recall_tokenizer
from sepjax.data.labelled import Labelled, LabelledIterator
from sepjax.data.locks import exclusive
from sepjax.data.mixed_reader import MixedReader, mixed_pass
from sepjax.data.mixture import parts_of
from sepjax.data.one_pass import loss_pattern, one_pass, separator_flags
from sepjax.data.reader import BatchReader, Shard
from sepjax.data.sources import sources_of
from sepjax.data.texts import BadDocuments, TextSource
from sepjax.data.tokenizer import FILES, Tokenizer, train_sentencepiece
from sepjax.progress import working

# Batches that were made ahead and nobody takes any more: Grain does not take all of them back, and Python does, with a
# warning at the end of every run.
_LEFT_OVER = "ignore:resource_tracker:UserWarning"
_TOKENIZER_CHARACTERS = 10_000_000  # of the corpus, spread over it, that a tokenizer is trained on


def prepare_tokenizer(
    config: Config,
    data_dir: str,
    tokenizer_dir: str | os.PathLike[str],
    given: Callable[[], Tokenizer] | None = None,
) -> Tokenizer:
    """The run's tokenizer, kept in `tokenizer_dir`.

    It is read from there if it is there; else it is `data.tokenizer`, or trained on the training split, and saved.

    Args:
      config: the experiment.
      data_dir: where prepared datasets are.
      tokenizer_dir: a folder of the run.
      given: reads the tokenizer of a pretrained model, which then takes the place of both.

    Raises:
      ConfigError: the vocabulary is larger than model.vocab_size.
      DataError, OSError: a file cannot be used, read or written.
    """
    folder = epath.Path(tokenizer_dir)
    if not _holds_tokenizer(folder):
        with exclusive(folder):
            if not _holds_tokenizer(folder):
                (given() if given else _make_tokenizer(config, data_dir)).save(folder)
    tokenizer = Tokenizer.load(folder)
    _check_vocabulary(config, tokenizer)
    return tokenizer


def training_batches(
    config: Config,
    tokenizer: Tokenizer,
    data_dir: str,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    form: Form | None = None,
) -> LabelledIterator:
    """Shuffled batches of the training split, for ever: this process's data.batch_size / process_count rows of each.

    `form` says how conversations are written, where `data.name` has some.

    Every epoch each document is read once, by one process, in an order that depends on `seed` and the epoch. The
    iterator's `get_state()` is JSON; `set_state()` continues bit for bit, with prefetching threads or worker processes,
    and so do other numbers of processes (`sepjax.data.labelled`).

    Raises:
      ConfigError: rows, documents or vocabulary do not fit.
      DataError, OSError: see `text_source`; from `next`, DataError where the documents have no token at all.
    """
    _check_vocabulary(config, tokenizer)
    rows = _rows_per_process(config, process_count)
    sources = sources_of(config.data, data_dir, config.data.train_split, form)
    workers = max(config.data.num_workers, 1)
    _check_documents(sources, process_count, workers)

    def share(index: int, count: int) -> grain.IterDataset[Batch]:
        places = [(index + count * i, count * workers) for i in range(workers)]
        return _prefetched([_reader(config, sources, tokenizer, x, seed) for x in places], config.data.num_workers)

    made_by: dict[str, int | str] = {
        "dataset": ", ".join(source.name for source in sources),
        "documents": len(sources[0]) if len(sources) == 1 else ", ".join(str(len(source)) for source in sources),
        "vocab_size": tokenizer.vocab_size,
        "rows": rows,
        "sequence_length": config.data.sequence_length,
        "seed": seed,
        "process_index": process_index,
        "process_count": process_count,
        "num_workers": config.data.num_workers,
    }
    if config.data.loss_on:
        made_by["loss_on"] = config.data.loss_on
    if any(source.read_from != "copies" for source in sources):
        made_by["read_from"] = ", ".join(source.read_from for source in sources)
    if len(sources) > 1:
        made_by["shares"] = ", ".join(str(part.share) for part in parts_of(config.data.name))
    if any(source.conversations for source in sources):
        made_by |= {"train_on": config.data.train_on, "too_long": config.data.too_long}
    return iter(Labelled(share, made_by))


def evaluation_passes(
    config: Config,
    tokenizer: Tokenizer,
    data_dir: str,
    *,
    process_index: int = 0,
    process_count: int = 1,
    form: Form | None = None,
) -> Callable[[], Iterator[Batch]]:
    """Makes passes over the evaluation split in its own order; all processes yield the same number of batches.

    The last batch is padded to its full size. All passes are over the data as they are now: files that change meanwhile
    are not prepared anew in the midst of a run. Raises as `training_batches` does, at once and not only when batches
    are asked for; and, then, DataError if there is no token.
    """
    _check_vocabulary(config, tokenizer)
    rows = _rows_per_process(config, process_count)
    sources = sources_of(config.data, data_dir, config.data.eval_split, form)
    mine = slice(process_index * rows, (process_index + 1) * rows)
    return functools.partial(_rows_of, mine, sources, config, tokenizer)


def evaluation_batches(config: Config, tokenizer: Tokenizer, data_dir: str, **here: Any) -> Iterator[Batch]:
    """One pass of `evaluation_passes`, whose arguments and errors are its own."""
    return evaluation_passes(config, tokenizer, data_dir, **here)()


def _rows_of(mine: slice, sources: Sequence[TextSource], config: Config, tokenizer: Tokenizer) -> Iterator[Batch]:
    if parts := parts_of(config.data.name):
        passes = [functools.partial(one_pass, source, config, tokenizer, 1) for source in sources]
        batches = mixed_pass(parts, passes, config.data.batch_size)
    else:
        batches = one_pass(sources[0], config, tokenizer, config.data.batch_size)
    for batch in batches:
        yield jax.tree.map(lambda x: x[mine], batch)


def _check_documents(sources: Sequence[TextSource], process_count: int, workers: int) -> None:
    for source in sources:
        if len(source) < process_count * workers:
            raise ConfigError(
                f"{source.name} has {len(source)} documents for {process_count} processes of {workers} readers each, "
                "and every reader needs one; use fewer processes, a smaller data.num_workers or more, shorter files"
            )


def _reader(
    config: Config,
    sources: Sequence[TextSource],
    tokenizer: Tokenizer,
    place: tuple[int, int],
    seed: int,
) -> BatchReader | MixedReader:
    """The batches of one reader; `place` is its index and the number of readers."""
    data, parts = config.data, parts_of(config.data.name)
    (index, count), flag = place, separator_flags(config, tokenizer)
    rows = data.batch_size // (count // max(data.num_workers, 1))
    readers = [
        BatchReader(
            source,
            tokenizer,
            flag,
            Shard(len(source), index, count, (seed + number) % 2**32),
            rows=1 if parts else rows,
            length=data.sequence_length,
            max_bad=data.max_bad_documents,
            loss_on=loss_pattern(data),
            skip_long=data.too_long == "skip",
            batch_rows=rows,
        )
        for number, source in enumerate(sources)
    ]
    return MixedReader(parts, readers, rows) if parts else readers[0]


def _prefetched(readers: Sequence[BatchReader | MixedReader], num_workers: int) -> grain.IterDataset[Batch]:
    """The readers' batches in turn, made ahead by a thread, or by a process each; a block ahead, so that none waits."""
    ahead = readers[0].batches_per_block + 1
    if not num_workers:
        return grain.experimental.ThreadPrefetchIterDataset(readers[0], prefetch_buffer_size=ahead)
    children.spare_spawned()
    if _LEFT_OVER not in sys.warnoptions:  # which Python hands on to the process that takes back shared memory
        sys.warnoptions.append(_LEFT_OVER)
    # Workers hand batches over in /dev/shm, where a block is about 10 MB; a container may have as little as 64 MB.
    one_process = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=ahead)
    workers = [reader.mp_prefetch(one_process, worker_init_fn=interrupt.leave_to_parent) for reader in readers]
    return grain.experimental.InterleaveIterDataset(workers, cycle_length=num_workers)


def _make_tokenizer(config: Config, data_dir: str) -> Tokenizer:
    if config.data.tokenizer:
        return Tokenizer.load(config.data.tokenizer)
    if config.data.name == "recall":
        return recall_tokenizer()
    sources = sources_of(config.data, data_dir, config.data.train_split)
    shares = [part.share for part in parts_of(config.data.name)] or [1.0]
    bad = config.data.max_bad_documents
    samples = [
        _sample(source, math.ceil(share * _TOKENIZER_CHARACTERS), BadDocuments(bad))
        for source, share in zip(sources, shares, strict=True)
    ]
    with working("training a tokenizer"):
        return train_sentencepiece(itertools.chain(*samples), config.data.tokenizer_vocab_size)


def _sample(source: TextSource, num_characters: int, bad: BadDocuments) -> Iterator[str]:
    """Documents spread evenly over the source, up to about `num_characters`."""
    step = math.ceil(len(source) * source.bytes_per_document / num_characters)
    for i in range(0, len(source), step):
        text = bad.read(source, [i])[0][:num_characters]
        num_characters -= len(text)
        yield text


def _holds_tokenizer(folder: epath.Path) -> bool:
    return any((folder / name).exists() for name in FILES)


def _rows_per_process(config: Config, process_count: int) -> int:
    rows, remainder = divmod(config.data.batch_size, process_count)
    if remainder or not rows:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} must be a multiple of the {process_count} processes: each "
            "reads its own rows"
        )
    return rows


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size={config.model.vocab_size}; the "
            f"embedding needs a row a token: set model.vocab_size to {tokenizer.vocab_size} or more"
        )
