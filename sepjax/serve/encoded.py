"""Texts of conversations with their ids: what a client sends again with every turn is not encoded again.

    known    <|im_start|>user ... <|im_end|> <|im_start|>            up to the last control token that divides texts
    comes    <|im_start|>user ... <|im_end|> <|im_start|>assistant ... <|im_end|> <|im_start|>user ...
             begins with all of the known one: only what is behind it is encoded

Templates render all of a conversation each time, and may write it otherwise than before: the texts are compared, not
the messages. Where a tokenizer is not known to treat both parts of a text by themselves (`Tokenizer.dividers`), all is
encoded.
"""

import functools
import hashlib
import re
import sys
import threading
from collections import OrderedDict

import numpy as np

from sepjax.array_typing import Int32
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.chat_template import CLOSE, OPEN, encode_marked

type Ids = Int32[np.ndarray, "T"]

_BLOCK = 1024  # characters
_BUDGET = 32 << 20  # bytes


class EncodedTexts:
    """Of one model; those used last stay. For any thread."""

    def __init__(self, budget: int = _BUDGET):
        """`budget`: bytes of texts and ids."""
        self._budget, self._lock, self.nbytes = budget, threading.Lock(), 0
        self._known: OrderedDict[str, Ids] = OrderedDict()
        self._places: dict[bytes, set[str]] = {}  # by the hash of a text's last whole block

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The ids of a rendered text: those of `encode_marked`."""
        divider = _divider(tokenizer)
        if divider is None or len(text) < _BLOCK:
            return encode_marked(tokenizer, text)
        places = _chain(text)
        before, known = self._longest(text, places)
        size = len(before)
        cut = max((found.end() for found in divider.finditer(text, size)), default=size)
        if cut == size or text.rfind(OPEN, size, cut) > text.rfind(CLOSE, size, cut):  # in what is marked
            return known.tolist() + encode_marked(tokenizer, text[size:])
        known = np.concatenate([known, np.array(encode_marked(tokenizer, text[size:cut]), np.int32)])
        self._remember(text[:cut], known, places, instead=before)
        return known.tolist() + encode_marked(tokenizer, text[cut:])

    def _longest(self, text: str, places: list[bytes]) -> tuple[str, Ids]:
        """The longest known text that this one begins with, and its ids."""
        with self._lock:
            for place in reversed(places):
                fitting = [known for known in self._places.get(place, ()) if text.startswith(known)]
                if fitting:
                    best = max(fitting, key=len)
                    self._known.move_to_end(best)
                    return best, self._known[best]
        return "", np.zeros(0, np.int32)

    def _remember(self, text: str, ids: Ids, places: list[bytes], *, instead: str) -> None:
        """`instead`: what it goes on from, which may go first now."""
        with self._lock:
            if instead in self._known:
                self._known.move_to_end(instead, last=False)
            if len(text) < _BLOCK or text in self._known:
                return
            self._known[text] = ids
            self._places.setdefault(places[len(text) // _BLOCK - 1], set()).add(text)
            self.nbytes += _nbytes(text, ids)
            while self.nbytes > self._budget:
                old, its = self._known.popitem(last=False)
                place = _chain(old)[-1]
                self._places[place].remove(old)
                if not self._places[place]:
                    del self._places[place]
                self.nbytes -= _nbytes(old, its)


def _nbytes(text: str, ids: Ids) -> int:
    return sys.getsizeof(text) + ids.nbytes


def _chain(text: str) -> list[bytes]:
    """A hash for every whole block: of all characters up to its end."""
    found, before = [], b""
    for end in range(_BLOCK, len(text) + 1, _BLOCK):
        block = text[end - _BLOCK : end].encode(errors="surrogatepass")
        before = hashlib.blake2b(before + block, digest_size=16).digest()
        found.append(before)
    return found


@functools.lru_cache(maxsize=16)
def _divider(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Finds where a text may be cut: behind a control token that is not marked as text. None: nowhere."""
    names = "|".join(map(re.escape, tokenizer.dividers()))
    return re.compile(f"(?<!{OPEN})(?:{names})") if names else None
