"""Rows on disk: what is read back, what is left alone, and whose a folder is."""

import copy
import dataclasses
import errno
import fcntl
import json
import re
import stat

import jax
import numpy as np
import pytest

from sepjax.serve import state as state_module
from sepjax.serve.conversations import Conversations, chain
from sepjax.serve.running import Options, Running
from sepjax.serve.served import fingerprint
from sepjax.serve.state import StateError, StateFolder
from tests.serve.tiny import tiny_served

IDS = np.arange(5, 11, dtype=np.int32)


@pytest.fixture(scope="module")
def served():
    return tiny_served()


@pytest.fixture(scope="module")
def row(served):
    stream = served.engine.stream(IDS.tolist(), bounded=True, max_new_tokens=1)
    assert list(stream)
    return stream.saved()


def opened(served, folder, memory=1 << 30):
    """(what keeps rows, its folder)."""
    disk = StateFolder(folder, served, 1 << 30)
    return Conversations(served.tokenizer, memory, disk), disk


def saved(kept, ids, row, **more):
    entry = kept.add(ids, chain(ids), None, row, **more)
    kept.save(entry, row)
    return entry


def test_what_is_read_back_lies_in_the_host_s_memory(served, row, tmp_path):
    kept, disk = opened(served, tmp_path / "state")
    entry = saved(kept, IDS, row)
    found = disk.read(entry.key)
    leaves = jax.tree.leaves(found.state)
    assert sum(isinstance(leaf, np.ndarray) for leaf in leaves) == len(leaves) - 1, "all but the key"
    assert found.seen == row.seen
    disk.close()


def test_an_entry_that_another_one_has_replaced_takes_nothing_with_it(served, row, tmp_path):
    """Its reading fails because the other one is being written in its place."""
    kept, disk = opened(served, tmp_path / "state")
    old = saved(kept, IDS, row, name="one")
    new = saved(kept, IDS, row, name="two")
    assert new.names == ("one", "two")
    before = kept.nbytes
    kept._remove(old)
    assert (kept.get("one"), kept.get("two"), len(kept), kept.nbytes) == (new, new, 1, before)
    assert disk.read(new.key) is not None
    disk.close()


def test_what_cannot_be_read_now_is_kept(served, row, tmp_path, monkeypatch):
    """No file handles are left, say; what is damaged goes."""
    kept, disk = opened(served, tmp_path / "state")
    entry, ids = saved(kept, IDS, row, name="one"), np.append(IDS, IDS)
    entry.row = None  # as after a restart

    def busy(*_):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(state_module.SavedRow, "read", busy)
        assert kept.plan(ids, chain(ids)).cached == 0
        assert kept.row(entry) is None
    assert kept.get("one") is entry
    assert kept.plan(ids, chain(ids)).cached == len(IDS)
    entry.row = None
    (tmp_path / "state" / entry.key / "stream.json").write_text("{")
    assert kept.plan(ids, chain(ids)).cached == 0
    assert kept.get("one") is None
    assert not list((tmp_path / "state").glob(f"*{entry.key}*"))
    disk.close()


def test_a_folder_is_of_one_shape_and_way_of_keeping(served):
    """Two models of the same weights may differ in what no weight tells."""
    engine = served.engine
    config = dataclasses.replace(engine.prepared.config, norm_epsilon=0.5)
    other = copy.copy(engine)
    other._of = dataclasses.replace(engine.prepared, config=config)
    assert fingerprint(other) != fingerprint(engine)
    # A version with one setting more, which is at its default, has the same conversations.
    for extra, same in ((3, True), (4, False)):
        later = dataclasses.make_dataclass("Later", [("extra", int, 3)], bases=(type(config),), unsafe_hash=True)
        other._of = dataclasses.replace(engine.prepared, config=later(**vars(engine.prepared.config), extra=extra))
        assert (fingerprint(other) == fingerprint(engine)) == same


def test_a_folder_of_another_pattern_says_which(served, tmp_path):
    """As after a choice was stored with the model (`sepjax.kept`), or by an older version."""
    opened(served, tmp_path / "state")[1].close()
    file = tmp_path / "state" / "server.json"
    words = json.loads(file.read_text())
    here = served.engine.kept.in_words()
    for keeps, said in (("watched a=4 c=9", "watched a=4 c=9"), (None, "an unnamed one, such as --pattern=separator")):
        theirs = words | {"fingerprint": "other", "keeps": keeps}
        file.write_text(json.dumps({name: x for name, x in theirs.items() if x is not None}))
        with pytest.raises(StateError, match=re.escape(f"another pattern ({said}; here: {here})")):
            StateFolder(tmp_path / "state", served, 1 << 30)


def test_a_wrong_folder_is_told_before_the_model_is_loaded(served, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("a")
    _, disk = opened(served, tmp_path / "state")
    for folder, message in (("mine", "holds notes.txt, which is not a server's state"), ("state", "another server")):
        with pytest.raises(StateError, match=message):
            Running(lambda: pytest.fail("loaded"), Options(state=str(tmp_path / folder)))
    disk.close()


def test_ids_are_bounded_too(served, row, tmp_path):
    """Of rows on disk the ids stay in memory; they count, and so does all of a row."""
    kept, disk = opened(served, tmp_path / "state", memory=2 * served.row_bytes + 4 * 4000)
    leaves = jax.tree.leaves(dataclasses.replace(row.state, key=None))
    first = saved(kept, IDS, row)
    assert first.row_bytes == served.row_bytes == sum(leaf.nbytes for leaf in leaves)
    text = np.full(served.row_bytes // 4, 7, np.int32)
    for number in range(4):
        text[0] = number
        saved(kept, text.copy(), row, name=str(number))
        assert kept.nbytes <= 2 * served.row_bytes + 4 * 4000
    assert kept.get("3") is not None
    assert kept.get("0") is None
    assert len(list((tmp_path / "state").glob("[!.]*.json"))) == 1 + len(kept)
    disk.close()
    again, disk = opened(served, tmp_path / "state", memory=len(text) * 4 + 100)
    assert [entry.names for entry in again._entries.values()] == [("3",)]
    disk.close()


def test_a_folder_keeps_what_is_not_ours_and_what_can_be_read(served, row, tmp_path):
    """A kill between two renames leaves the row under another name; the first start may be killed, too."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "lost+found").mkdir()
    (folder / ".server.json.12.partial").write_text("{")
    kept, disk = opened(served, folder)
    entry, other = saved(kept, IDS, row, name="one"), saved(kept, IDS[:-1], row, name="two")
    disk.close()
    (folder / entry.key).rename(folder / f".{entry.key}.old")
    (folder / f".{other.key}.old").mkdir()
    (folder / "notes.json").write_text("mine")
    kept, disk = opened(served, folder)
    names = {path.name for path in folder.iterdir()}
    rows = {f".{entry.key}.old", f"{entry.key}.json", other.key, f"{other.key}.json"}
    assert names == {"server.json", "lock", "lost+found", "notes.json"} | rows
    assert disk.read(entry.key).seen == row.seen
    kept._remove(kept.get("one"))
    assert not list(folder.glob(f"*{entry.key}*"))
    disk.close()


def test_a_folder_is_for_its_server_alone(served, tmp_path, monkeypatch):
    _, disk = opened(served, tmp_path / "state")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    with pytest.raises(StateError, match="another server uses"):
        StateFolder(tmp_path / "state", served, 1)
    disk.close()

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StateError, match=r"cannot lock .*: No locks available; choose a folder on"):
        StateFolder(tmp_path / "state", served, 1)
