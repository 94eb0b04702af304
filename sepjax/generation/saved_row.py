"""Where one text stands, device and host: what can be saved at any token and goes on as if nothing had happened."""

import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.config import ModelConfig
from sepjax.config.versions import completed
from sepjax.generation import saved
from sepjax.generation.cache.mixed import BOUNDED, MixedCache
from sepjax.generation.cache.view import CacheView, of_row
from sepjax.generation.device_loop import DecodeState
from sepjax.generation.packed import Copying, Form, PackedState
from sepjax.generation.readers import Reader
from sepjax.generation.saved import StreamStateError


@dataclasses.dataclass(frozen=True, repr=False)
class SavedRow:
    """One row, of a stream or of slots."""

    standing: DecodeState | PackedState  # of one row
    pending: tuple[int, ...]  # tokens that the cache has yet to take up; empty: all but the last drawn one
    has_drawn: bool  # whether there is a last drawn token
    row: dict[str, Any]  # `Row.state()`

    def __repr__(self) -> str:
        return f"SavedRow({self.row.get('seen', 0)} tokens seen, {len(self.pending)} to be read)"

    @property
    def state(self) -> DecodeState:
        """Where it stands; on the host, if it was packed."""
        return self.standing.state() if isinstance(self.standing, PackedState) else self.standing

    @property
    def _bare(self) -> DecodeState:
        """Where it stands, without keys and values if it was packed: nobody waits for these."""
        return self.standing.bare() if isinstance(self.standing, PackedState) else self.standing

    def packed(self, form: Form) -> PackedState:
        """The same packed as a `form` has it, which must be that of its cache (`check`)."""
        if isinstance(self.standing, PackedState):
            return self.standing
        return PackedState(form, form.packed_on_host(self.standing))

    def on_host(self) -> "SavedRow":
        """The same, its arrays in the host's memory; the random key, of a few bytes, may stay on a device."""
        if isinstance(self.standing, PackedState):
            return dataclasses.replace(self, standing=self.standing.on_host())
        state: Any = dataclasses.replace(self.standing, key=None)
        return dataclasses.replace(
            self, standing=dataclasses.replace(jax.device_get(state), key=self.standing.key)
        )  # fmt: skip

    def copying(self) -> Copying | None:
        """A copy to the host's memory, on its way (`copied`); None: it is there, or is not packed."""
        standing = self.standing
        return Copying(standing) if isinstance(standing, PackedState) and not standing.is_on_host else None

    def copied(self, copying: Copying | None) -> "SavedRow":
        """The same as `on_host` has it, of what `copying` gave; waits for it."""
        return self.on_host() if copying is None else dataclasses.replace(self, standing=copying.result())

    @property
    def is_pooled(self) -> bool:
        """Whether it lies among rows of a device that have a place whatever becomes of it."""
        return isinstance(self.standing, PackedState) and self.standing.is_pooled

    @property
    def nbytes(self) -> int:
        """Of its arrays, but for the random key's."""
        if isinstance(self.standing, PackedState):
            return self.standing.form.nbytes
        leaves = jax.tree.leaves(dataclasses.replace(self.standing, key=None))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    @property
    def last_token(self) -> int | None:
        """The token drawn last, unless it is pending; None: there is none."""
        return int(self._bare.token[0]) if self.has_drawn and not self.pending else None

    @property
    def seen(self) -> int:
        """Tokens that the cache has taken up."""
        return self.row["seen"]

    @property
    def is_full(self) -> bool:
        """Whether its cache is bounded and must not lose what the next token would push out."""
        if isinstance(self.standing, PackedState) and not self.standing.form.ends_when_stuck:
            return False  # and nobody waits for it
        cache: Any = self._bare.cache
        if not cache.ends_when_stuck:
            return False
        return bool(jax.tree.map(jnp.asarray, cache.bare()).is_stuck()[0])

    def view(self, nbytes: int | None = None) -> CacheView:
        """What its cache holds, and from where in the text; `nbytes` of the row, if not those of its arrays.

        Of caches of several sizes, what the first part holds. Raises StreamStateError for a growing cache.
        """
        return self.views(nbytes)[0]

    def views(self, nbytes: int | None = None) -> tuple[CacheView, ...]:
        """`view` of every part of its cache: of layers of one size."""
        cache: Any = self._bare.cache
        if not isinstance(cache, BOUNDED):
            raise StreamStateError("a growing cache has no zones to look at; take a row of a bounded one")
        if nbytes is None:
            nbytes = cache.nbytes + (self.standing.form.kv_nbytes if isinstance(self.standing, PackedState) else 0)
        parts = cache.parts if isinstance(cache, MixedCache) else (cache,)
        return tuple(of_row(part, self.seen, nbytes) for part in parts)

    def check(self, reader: Reader) -> None:
        """Raises StreamStateError where the cache is not one of this reader's: of another kind, or other sizes."""
        if isinstance(self.standing, PackedState) and self.standing.form == reader.form:
            return
        cache: Any = self.state.cache
        if not isinstance(cache, reader.cache_type):
            names = {True: "bounded", False: "growing"}
            raise StreamStateError(
                f"the saved row has a {names[isinstance(cache, BOUNDED)]} cache, expected a "
                f"{names[reader.cache_type is BOUNDED]} one; take up a row of the same kind"
            )
        mine = cache.sizes.cache_dtype if isinstance(cache, BOUNDED) else cache.cache_dtype
        ours = reader.settings()["cache_dtype"]
        if mine != ours:
            raise StreamStateError(
                f"the saved row has a cache of cache_dtype={mine!r}, expected {ours!r}; give the same settings"
            )
        like: Any = jax.eval_shape(lambda: reader.empty(jax.random.split(jax.random.key(0), 1), reader.room_of(cache)))
        if isinstance(cache, BOUNDED):
            if type(cache) is not type(like.cache):
                names = {True: "layers of several sizes", False: "layers of one size"}
                raise StreamStateError(
                    f"the saved row has {names[isinstance(cache, MixedCache)]}, expected "
                    f"{names[isinstance(like.cache, MixedCache)]} (layer_windows); give the same settings"
                )
            mine, ours = (dataclasses.asdict(x.sizes) for x in (cache, like.cache))
            for name in (name for name in ours if ours[name] != mine[name]):
                raise StreamStateError(
                    f"the saved row has a cache of {name}={mine[name]}, expected {ours[name]}; give the same settings"
                )
        mine, ours = ([(x.shape, x.dtype) for x in jax.tree.leaves(state)] for state in (self.state, like))
        if mine != ours or jax.tree.structure(self.state) != jax.tree.structure(like):
            raise StreamStateError("the saved row is of a model of another shape; load the model that it was saved of")

    def write(self, folder: str | os.PathLike[str], reader: Reader, config: ModelConfig) -> None:
        """Writes all that `read` needs, in place of an older stream. A kill at any moment leaves the old or the new.

        Raises:
          sepjax.files.ForeignFolder: the folder holds something else than a saved stream.
          sepjax.files.WriteError: it cannot be written.
        """
        words = {
            "model": dataclasses.asdict(config),
            "sizes": reader.settings(),
            "attention": dataclasses.asdict(reader.attention),  # for whoever goes on without settings of his own
            "room": reader.room_of(self.state.cache),
            "pending": list(self.pending),
            "has_drawn": self.has_drawn,
            **self.row,
        }
        saved.write(folder, words, jax.tree.leaves(_plain(self.state)))

    @classmethod
    def read(cls, folder: str | os.PathLike[str], reader: Reader, config: ModelConfig) -> "SavedRow":
        """What `write` wrote.

        Raises:
          FileNotFoundError: nothing was saved there.
          StreamStateError: the files are damaged, or of a model of another shape, or of a cache of other sizes.
        """
        words, place = saved.read(folder)
        if any(not 0 <= i < config.vocab_size for i in words["pending"]):
            raise StreamStateError(f"{os.fspath(folder)!r} has tokens that the model does not know; use another copy")
        theirs = {"model": completed(words["model"], config), "sizes": reader.completed(words["sizes"])}
        for name, ours in (("model", dataclasses.asdict(config)), ("sizes", reader.settings())):
            mine, saved_by = json.loads(json.dumps(ours)), theirs[name]
            different = sorted(key for key in mine.keys() | saved_by.keys() if mine.get(key) != saved_by.get(key))
            different.sort(key=lambda key: (key != "pattern", key != "cache_dtype"))  # which explain all others
            if different:
                key = different[0]
                raise StreamStateError(
                    f"the stream in {os.fspath(folder)!r} was saved with {name}.{key}={saved_by.get(key)!r}, "
                    f"expected {mine.get(key)!r}; load the same model, and give the same cache settings or none"
                )
        keys = jax.random.split(jax.random.key(0), 1)
        leaves, structure = jax.tree.flatten(_plain(reader.empty(keys, words["room"])))
        state = jax.tree.unflatten(structure, saved.read_leaves(place, words, leaves))
        state = dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
        row = {name: words[name] for name in ("seen", "finish_reason", "text", "guard")}
        return cls(state, tuple(words["pending"]), words["has_drawn"], row)


def _plain(state: DecodeState) -> DecodeState:
    """The state with its keys as plain numbers, which files can hold."""
    return dataclasses.replace(state, key=jax.random.key_data(state.key))
