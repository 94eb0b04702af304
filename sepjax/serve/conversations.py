"""Rows that were kept, found again by the token ids that they have seen: what was read once is not read again.

    row kept      ids of the prompt and the answer, but for the last, which the cache has yet to take up
    request       ids that begin with all of those, and one more at least: it goes on from there; the longest row wins

Ids are compared, never text: where a template rewrites earlier turns, or an answer's text has other ids than those that
were drawn, nothing matches, and the request is read as if nobody had been there before. Rows are found by a chain of
hashes over blocks of ids, and then compared in full.

The same chain tells what requests have in common: a beginning that an earlier request had too (a system prompt, say) is
read by itself, kept, and gone on from. Not at its first use: most prompts never come again.
"""

import dataclasses
import hashlib
import logging
import threading
from collections import OrderedDict

import numpy as np

from sepjax.array_typing import Int32
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.saved_row import SavedRow
from sepjax.serve.state import StateFolder

log = logging.getLogger("sepjax.serve")
BLOCK = 32  # ids
_SEEN = 1 << 16  # blocks of earlier requests that are remembered
_NAMES = 8  # responses that ended with the same ids, by which a row is found

Ids = Int32[np.ndarray, "T"]


def chain(ids: Ids, begun: tuple[bytes, ...] = ()) -> tuple[bytes, ...]:
    """A hash for every whole block: of all ids up to its end. `begun`: those of the first blocks, which are known."""
    found, before = list(begun), begun[-1] if begun else b""
    data = np.ascontiguousarray(ids[len(begun) * BLOCK :], np.int32).tobytes()
    for end in range(4 * BLOCK, len(data) + 1, 4 * BLOCK):
        before = hashlib.blake2b(before + data[end - 4 * BLOCK : end], digest_size=16).digest()
        found.append(before)
    return tuple(found)


@dataclasses.dataclass(eq=False)
class Entry:
    """A row that was kept."""

    key: str  # of its ids: a name for files
    place: bytes  # the hash of its last whole block
    ids: Ids  # that the cache has seen
    last: int | None  # the token drawn after them; None: the row is the beginning of several texts
    row: SavedRow | None  # None: on disk
    row_bytes: int
    disk_bytes: int = 0  # 0: not on disk
    on_device: bool = False  # whether its row is one of those that the device has room for
    names: tuple[str, ...] = ()  # ids of responses

    @property
    def token_ids(self) -> list[int]:
        """All of the text."""
        return [*self.ids.tolist(), *([] if self.last is None else [self.last])]

    @property
    def nbytes(self) -> int:
        """In the host's memory."""
        return self.ids.nbytes + (0 if self.row is None or self.on_device else self.row_bytes)


def _begins(entry: Entry, ids: Ids, most: int) -> bool:
    size = len(entry.ids)
    return size <= most and np.array_equal(entry.ids, ids[:size])


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a prompt is read."""

    entry: Entry | None  # the row to go on from
    row: SavedRow | None  # that of `entry`
    cut: int  # so many of the ids are a beginning to keep, before the rest is read; 0: none

    @property
    def cached(self) -> int:
        """Ids that need not be read again."""
        return 0 if self.entry is None else len(self.entry.ids)


class Conversations:
    """The rows of one server, the least recently used go first. For any thread."""

    def __init__(self, tokenizer: Tokenizer, budget: int, disk: StateFolder | None = None, on_device: int = 0):
        """Takes up what lies on the disk.

        Args:
          tokenizer: the model's.
          budget: bytes of the host's memory, for rows and ids; 0: none is kept.
          disk: where they are kept beyond this process's life; its own budget bounds it.
          on_device: bytes of the device's memory for those used last, beyond `budget` (`Keeper` sees to it); 0: rows
            count as the host's from the first.
        """
        self.on_device = on_device
        self._tokenizer, self._budget, self._disk = tokenizer, budget, disk
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the most recently used last
        self._places: dict[bytes, dict[str, Entry]] = {}  # by the hash of their last whole block
        self._names: dict[str, Entry] = {}
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._making: set[bytes] = set()
        self.nbytes = 0
        for found in disk.entries() if disk is not None else ():
            place = (b"", *chain(found.ids))[-1]
            entry = Entry(found.key, place, found.ids, found.last, None, found.row_bytes, found.nbytes)
            entry.names = found.names
            self._put(entry)
        if self._entries and self.is_on:
            self._evict(besides=next(reversed(self._entries.values())))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def device_nbytes(self) -> int:
        """Of rows that are the device's."""
        with self._lock:
            return sum(e.row_bytes for e in self._entries.values() if e.on_device and e.row is not None)

    @property
    def is_on(self) -> bool:
        """Whether rows are kept at all."""
        return self._budget > 0

    def get(self, name: str) -> Entry | None:
        """The row of a response, by its id (of its further choices, ID:1 and so on); None: it is not kept any more."""
        with self._lock:
            return self._names.get(name)

    def row(self, entry: Entry) -> SavedRow | None:
        """That of an entry, from disk if it is there; None: it is gone."""
        return self._row_of(entry)

    # -- what a request goes on from --------------------------------------------------------------------------------

    def plan(self, ids: Ids, blocks: tuple[bytes, ...]) -> Plan:
        """How to read a prompt, `blocks` its chain; remembers it. A `cut` must be `made` or `given_up`."""
        if not self.is_on:
            return Plan(None, None, 0)
        entry, row = self._longest(ids, blocks)
        cached = 0 if entry is None else len(entry.ids)
        with self._lock:
            shared = next((i for i in range(len(blocks), 0, -1) if blocks[i - 1] in self._seen), 0)
            shared = min(shared, self.most(ids) // BLOCK)  # something is left to be read, and by itself means the same
            for block in blocks:
                self._seen[block] = None
                self._seen.move_to_end(block)
            while len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
            if shared <= 0 or shared * BLOCK < cached + BLOCK or blocks[shared - 1] in self._making:
                return Plan(entry, row, 0)
            self._making.add(blocks[shared - 1])
            return Plan(entry, row, shared * BLOCK)

    def given_up(self, cut: int, blocks: tuple[bytes, ...]) -> None:
        """Nobody makes the beginning of a plan any more."""
        with self._lock:
            self._making.discard(blocks[cut // BLOCK - 1])

    def warm(self, ids: Ids, blocks: tuple[bytes, ...]) -> None:
        """Reads from disk what `plan` is about to want, so that the thread of the slots need not wait for it."""
        if self.is_on:
            self._longest(ids, blocks)

    def _longest(self, ids: Ids, blocks: tuple[bytes, ...]) -> tuple[Entry | None, SavedRow | None]:
        missed: set[Entry] = set()
        while (entry := self._match(ids, blocks, missed)) is not None:
            row = self._row_of(entry)
            if row is not None:
                return entry, row
            missed.add(entry)
        return None, None

    def _match(self, ids: Ids, blocks: tuple[bytes, ...], missed: set[Entry]) -> Entry | None:
        most = self.most(ids)
        with self._lock:
            for i in range(len(blocks), -1, -1):
                place = self._places.get(blocks[i - 1] if i else b"", {})
                fitting = [entry for entry in place.values() if entry not in missed and _begins(entry, ids, most)]
                if fitting:
                    found = max(fitting, key=lambda entry: len(entry.ids))
                    self._entries.move_to_end(found.key)
                    return found
            return None

    def most(self, ids: Ids) -> int:
        """The most ids that may have been read before the others: whatever else, one is left; below 0: none may."""
        if not self._tokenizer.starts_with_space:
            return len(ids) - 1
        # Whether a first space is the answer's own depends on whether there is text in what a row reads.
        return next((i for i in range(len(ids) - 1, -1, -1) if self._tokenizer.token_bytes(int(ids[i]))), -1)

    def _row_of(self, entry: Entry) -> SavedRow | None:
        row = entry.row
        if row is not None or self._disk is None:
            return row
        try:
            row = self._disk.read(entry.key)
        except OSError as error:  # it may be read another time
            log.warning("a saved conversation cannot be read now", extra={"reason": str(error)})
            return None
        with self._lock:
            if row is None:
                self._remove(entry)
            elif self._entries.get(entry.key) is entry and entry.row is None:
                self._set_row(entry, row)
                self._evict(besides=entry)
        return row

    # -- what is kept -----------------------------------------------------------------------------------------------

    def add(
        self, ids: Ids, blocks: tuple[bytes, ...], last: int | None, row: SavedRow, name: str = "", *,
        instead: Entry | None = None,
    ) -> Entry:  # fmt: skip
        """Keeps a row.

        Args:
          ids: that it has seen.
          blocks: `chain` of them.
          last: the token drawn after them; None: the row is a beginning of several texts.
          row: as it was before it drew its last token (`SlotRequest.undrawn`).
          name: by which `get` finds it.
          instead: what it went on from, which may go first now.
        """
        place, rest = (blocks[-1] if blocks else b""), np.ascontiguousarray(ids[len(blocks) * BLOCK :], np.int32)
        key = hashlib.blake2b(place + rest.tobytes(), digest_size=16).hexdigest()
        with self._lock:
            old = self._entries.get(key)
            names = () if old is None else old.names
            last = old.last if old is not None and last is None else last
            entry = Entry(key, place, ids, last, row, row.nbytes, 0 if old is None else old.disk_bytes)
            entry.names, entry.on_device = (*names, *([name] if name else []))[-_NAMES:], self.on_device > 0
            if old is not None:
                self._forget(old)
            if instead is not None and instead.last is not None and instead.key in self._entries:
                self._entries.move_to_end(instead.key, last=False)
            self._put(entry)
            self._evict(besides=entry)
        return entry

    def made(self, cut: int, blocks: tuple[bytes, ...], ids: Ids, row: SavedRow) -> Entry:
        """Keeps the beginning that a plan asked for."""
        self.given_up(cut, blocks)
        return self.add(ids[:cut], blocks[: cut // BLOCK], None, row)

    def moved(self, entry: Entry, row: SavedRow) -> None:
        """The row of an entry is in the host's memory now."""
        with self._lock:
            if entry.row is not None:
                self._set_row(entry, row)
                self._evict()

    def lost(self, entry: Entry) -> None:
        """The row of an entry cannot be fetched from the device: what is not on disk is forgotten."""
        with self._lock:
            if not entry.disk_bytes:
                self._forget(entry)
            else:
                self._set_row(entry, None)

    def _set_row(self, entry: Entry, row: SavedRow | None) -> None:
        """Of an entry that is kept: one in the host's memory, or none."""
        self.nbytes -= entry.nbytes
        entry.row, entry.on_device = row, False
        self.nbytes += entry.nbytes

    @property
    def has_disk(self) -> bool:
        """Whether rows are to be saved to disk."""
        return self._disk is not None

    def save(self, entry: Entry, row: SavedRow) -> None:
        """Puts an entry on disk, if rows are kept there."""
        if self._disk is None:
            return
        with self._lock:
            if self._entries.get(entry.key) is not entry:  # it has gone meanwhile
                return
            names, last = entry.names, entry.last
        size = self._disk.write(entry.key, entry.ids, last, names, row, entry.row_bytes)
        with self._lock:
            now = self._entries.get(entry.key)
            if now is None:  # it has gone meanwhile
                self._disk.remove(entry.key)
                return
            now.disk_bytes = size
            self._evict_from_disk(besides=now)

    def _put(self, entry: Entry) -> None:
        self._entries[entry.key] = entry
        self._places.setdefault(entry.place, {})[entry.key] = entry
        for name in entry.names:
            self._names[name] = entry
        self.nbytes += entry.nbytes

    def _forget(self, entry: Entry) -> bool:
        """Takes an entry out of all but the disk; False: it had gone, or another one has its place now."""
        if self._entries.get(entry.key) is not entry:
            return False
        del self._entries[entry.key]
        del self._places[entry.place][entry.key]
        if not self._places[entry.place]:
            del self._places[entry.place]
        for name in entry.names:
            if self._names.get(name) is entry:
                del self._names[name]
        self.nbytes -= entry.nbytes
        entry.row = None
        return True

    def _remove(self, entry: Entry) -> None:
        if self._forget(entry) and self._disk is not None and entry.disk_bytes:
            self._disk.remove(entry.key)

    def _evict(self, besides: Entry | None = None) -> None:
        """Rows go from the host's memory, the oldest first; an entry that is on disk stays, and is read from there.

        Where ids alone are above the budget, the oldest go from the disk too: nobody could find them again.
        """
        if self.nbytes <= self._budget:
            return
        for entry in list(self._entries.values()):
            if self.nbytes <= self._budget:
                return
            if entry is besides or entry.row is None or entry.on_device:
                continue
            if entry.disk_bytes:
                self._set_row(entry, None)
            else:
                self._forget(entry)
        for entry in list(self._entries.values()):
            if self.nbytes <= self._budget:
                return
            if entry is not besides:
                self._remove(entry)

    def _evict_from_disk(self, besides: Entry) -> None:
        assert self._disk is not None
        total = sum(entry.disk_bytes for entry in self._entries.values())
        for entry in list(self._entries.values()):
            if total <= self._disk.budget:
                return
            if entry is not besides and entry.disk_bytes:
                total -= entry.disk_bytes
                self._remove(entry)
