"""METHOD section 4 in plain Python: what one row of a bounded cache must hold and show."""

import dataclasses


@dataclasses.dataclass
class ListStream:
    """One row: a list of entries, each (number of the token in the text, whether it is a separator)."""

    num_sinks: int
    max_separators: int
    window_size: int
    cache_size: int
    entries: list[tuple[int, bool]] = dataclasses.field(default_factory=list)
    kept: int = 0
    seen: int = 0
    dropped: int = 0

    def attended(self) -> dict[int, int]:
        """Token -> position of every entry that the next token, at position len(entries), sees besides itself."""
        return {token: k for k, (token, _) in enumerate(self.entries)}

    def append(self, is_separator: bool) -> None:
        self.entries.append((self.seen, is_separator))
        self.seen += 1
        if len(self.entries) > self.cache_size:
            self._compact()

    def _compact(self) -> None:
        a, end = self.num_sinks, len(self.entries) - self.window_size
        found = [entry for entry in self.entries[a + self.kept : end] if entry[1]]
        keep = self.entries[a : a + self.kept] + found
        survive = keep[max(0, len(keep) - self.max_separators) :]
        self.dropped += len(keep) - len(survive)
        self.entries = self.entries[:a] + survive + self.entries[end:]
        self.kept = len(survive)

    def room(self) -> int:
        """Tokens up to the next compaction, the one that causes it included."""
        return self.cache_size + 1 - len(self.entries)
