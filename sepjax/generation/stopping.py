"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from sepjax.data.tokenizer import IncrementalDecoder, Tokenizer


class TextUntilStop:
    """The text of one row up to its first stop string, which may run over several tokens.

    Text that may be the beginning of a stop string is held back until that is decided. Of several stop strings the one
    that is complete first counts, so the text does not depend on where tokens begin and end.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, continues: bool):
        """See `Tokenizer.decode` for `continues`. Stop strings are not empty."""
        self._decoder = IncrementalDecoder(tokenizer, continues=continues)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain after `token`, and `stopped` if it completes a stop string."""
        self._held += self._decoder.feed(token)
        found = [(self._held.index(s) + len(s), self._held.index(s)) for s in self._stop if s in self._held]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - max((_overlap(self._held, s) for s in self._stop), default=0))

    def flush(self) -> str:
        """The rest of a text that ends without a stop string; an unfinished character becomes U+FFFD."""
        return self._release(len(self._held)) + self._decoder.flush()

    def _release(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, not the whole of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
