"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

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

    def state(self) -> dict[str, Any]:
        """What is held back, for `restore`: plain JSON."""
        return {"held": self._held, "stopped": self.stopped, "decoder": self._decoder.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._held, self.stopped = state["held"], state["stopped"]
        self._decoder.restore(state["decoder"])

    def _release(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, not the whole of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class RepetitionGuard:
    """Notices when a text has become the same few tokens over and over."""

    LONGEST = 64  # tokens of a run that is found when it repeats
    LEAST = 32  # tokens that must have repeated: a row of dashes is no failure

    def __init__(self, most: int):
        """`most`: how often the same run of tokens may come in a row; 0: as often as it likes."""
        self._most = most
        self._recent: deque[int] = deque(maxlen=self.LONGEST)
        self._matched = np.zeros(self.LONGEST, np.int64)  # for each p: tokens in a row that equal the one p before

    def feed(self, token: int) -> bool:
        """Whether the tokens so far end in more than `most` copies of one run."""
        if not self._most:
            return False
        before = np.full(self.LONGEST, -1)
        before[: len(self._recent)] = list(self._recent)[::-1]
        self._matched = np.where(before == token, self._matched + 1, 0)
        self._recent.append(token)
        period = np.arange(1, self.LONGEST + 1)
        return bool(np.any(self._matched >= np.maximum(period * self._most, self.LEAST)))

    def state(self) -> dict[str, Any]:
        """What has come so far, for `restore`: plain JSON."""
        return {"recent": list(self._recent), "matched": self._matched.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._recent.extend(state["recent"])
        self._matched = np.array(state["matched"])
