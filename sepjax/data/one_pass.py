"""One pass over a source, for evaluation: batches of its documents in order, packed as a stream or whole."""

import functools
import re
from collections.abc import Iterator

from sepjax.config import Config, DataConfig
from sepjax.data.batch import Batch, padded
from sepjax.data.errors import DataError
from sepjax.data.packing import FlagSeparators, TokenStream, WholeRows, pack_rows
from sepjax.data.reader import LongDocuments
from sepjax.data.texts import BadDocuments, TextSource
from sepjax.data.tokenizer import Tokenizer
from sepjax.separators import configured_table, flag_separators

_TOLD: set[str] = set()  # corpora of which an evaluation has said how many conversations are too long


def one_pass(source: TextSource, config: Config, tokenizer: Tokenizer, rows: int) -> Iterator[Batch]:
    """One pass over a source in its own order, in batches of `rows` rows, the last of them padded."""
    flag, length = separator_flags(config, tokenizer), config.data.sequence_length
    documents = _Documents(source, tokenizer, config.data)
    if not source.conversations:
        return _of_stream(documents, flag, rows, length)
    tells = source.name not in _TOLD  # every evaluation reads the same
    _TOLD.add(source.name)
    long = LongDocuments(source.name, length, skip=config.data.too_long == "skip", tells=tells)
    return _of_whole_documents(long, documents, flag, rows, length)


class _Documents:
    """What of a source has not been read yet."""

    def __init__(self, source: TextSource, tokenizer: Tokenizer, data: DataConfig):
        self._source, self._tokenizer, self._unread = source, tokenizer, 0
        self._bad, self._loss_on = BadDocuments(data.max_bad_documents), loss_pattern(data)
        self.name = source.name

    def __bool__(self) -> bool:
        return self._unread < len(self._source)

    def next(self, num_tokens: int) -> TokenStream:
        """The next documents, of about so many tokens."""
        first, source = self._unread, self._source
        self._unread = min(first + source.documents_for(num_tokens), len(source))
        texts = self._bad.read(source, range(first, self._unread))
        return TokenStream.encode(self._tokenizer, texts, first, self._loss_on, conversations=source.conversations)


def separator_flags(config: Config, tokenizer: Tokenizer) -> FlagSeparators:
    """Flags the separators of a config in rows of token ids."""
    table = configured_table(tokenizer, config.attention)
    return functools.partial(flag_separators, table=table, attention=config.attention)


def loss_pattern(data: DataConfig) -> re.Pattern[str] | None:
    """`data.loss_on`, if there is one."""
    return re.compile(data.loss_on, re.DOTALL) if data.loss_on else None


def _of_stream(documents: _Documents, flag: FlagSeparators, rows: int, length: int) -> Iterator[Batch]:
    """Batches of all processes together."""
    size, stream, is_empty = rows * length, TokenStream.empty(), True
    while documents or len(stream):
        if documents and len(stream) < size:
            stream = TokenStream.join([stream, documents.next(size - len(stream))])
        else:
            batch, stream, is_empty = pack_rows(stream[:size], length, flag), stream[size:], False
            yield padded(batch, rows)
    if is_empty:
        raise DataError(f"{documents.name} has no tokens to evaluate on")


def _of_whole_documents(
    long: LongDocuments, documents: _Documents, flag: FlagSeparators, rows: int, length: int
) -> Iterator[Batch]:
    """`_of_stream` of documents that stay whole."""
    rest, is_empty = TokenStream.empty(), True
    while documents or len(rest):
        whole = WholeRows(rows, length)
        while not len(rest := whole.add(rest)) and documents:
            rest = long.fitted(documents.next(whole.free))
        batch = whole.batch(flag)
        is_empty &= not batch.loss_mask.any()
        yield batch
    if is_empty:
        raise DataError(f"{documents.name} has no answers to evaluate on")
