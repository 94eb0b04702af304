"""One pass over a source, for evaluation: batches of its documents in order, packed as a stream or whole."""

import functools
import re
from collections.abc import Iterator

from sepjax.config import Config, DataConfig
from sepjax.data.batch import Batch, padded
from sepjax.data.errors import DataError
from sepjax.data.packing import FlagSeparators, TokenStream, WholeRows, pack_rows
from sepjax.data.reader import LongDocuments
from sepjax.data.sources import BadDocuments, TextSource
from sepjax.data.tokenizer import Tokenizer
from sepjax.separators import configured_table, flag_separators

_TOLD: set[str] = set()  # corpora of which an evaluation has said how many conversations are too long


def one_pass(source: TextSource, config: Config, tokenizer: Tokenizer, rows: int) -> Iterator[Batch]:
    """One pass over a source in its own order, in batches of `rows` rows, the last of them padded."""
    flag, size = separator_flags(config, tokenizer), (rows, config.data.sequence_length)
    bad, loss_on = BadDocuments(config.data.max_bad_documents), loss_pattern(config.data)
    read = _of_stream
    if source.conversations:
        tells = source.name not in _TOLD  # every evaluation reads the same
        _TOLD.add(source.name)
        skip = config.data.too_long == "skip"
        long = LongDocuments(source.name, config.data.sequence_length, skip=skip, tells=tells)
        read = functools.partial(_of_whole_documents, long)
    return read(source, tokenizer, flag, *size, bad, loss_on)


def separator_flags(config: Config, tokenizer: Tokenizer) -> FlagSeparators:
    """Flags the separators of a config in rows of token ids."""
    table = configured_table(tokenizer, config.attention)
    return functools.partial(flag_separators, table=table, attention=config.attention)


def loss_pattern(data: DataConfig) -> re.Pattern[str] | None:
    """`data.loss_on`, if there is one."""
    return re.compile(data.loss_on, re.DOTALL) if data.loss_on else None


def _of_stream(
    source: TextSource,
    tokenizer: Tokenizer,
    flag: FlagSeparators,
    rows: int,
    length: int,
    bad: BadDocuments,
    loss_on: re.Pattern[str] | None,
) -> Iterator[Batch]:
    """Batches of all processes together."""
    size, stream, unread, is_empty = rows * length, TokenStream.empty(), 0, True
    while unread < len(source) or len(stream):
        if unread < len(source) and len(stream) < size:
            end = min(unread + source.documents_for(size - len(stream)), len(source))
            texts = bad.read(source, range(unread, end))
            stream = TokenStream.join([stream, TokenStream.encode(tokenizer, texts, unread, loss_on)])
            unread += len(texts)
        else:
            batch, stream, is_empty = pack_rows(stream[:size], length, flag), stream[size:], False
            yield padded(batch, rows)
    if is_empty:
        raise DataError(f"{source.name} has no tokens to evaluate on")


def _of_whole_documents(
    long: LongDocuments,
    source: TextSource,
    tokenizer: Tokenizer,
    flag: FlagSeparators,
    rows: int,
    length: int,
    bad: BadDocuments,
    loss_on: re.Pattern[str] | None,
) -> Iterator[Batch]:
    """`_of_stream` of documents that stay whole."""
    rest, unread, is_empty = TokenStream.empty(), 0, True
    while unread < len(source) or len(rest):
        whole = WholeRows(rows, length)
        while not len(rest := whole.add(rest)) and unread < len(source):
            end = min(unread + source.documents_for(whole.free), len(source))
            texts = bad.read(source, range(unread, end))
            rest = long.fitted(TokenStream.encode(tokenizer, texts, unread, loss_on, conversations=True))
            unread = end
        batch = whole.batch(flag)
        is_empty &= not batch.loss_mask.any()
        yield batch
    if is_empty:
        raise DataError(f"{source.name} has no answers to evaluate on")
