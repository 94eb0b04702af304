"""The format, read and written: round trips, and every way in which a file can be wrong."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.hub.errors import HubError
from sepjax.hub.safetensors_file import Planned, SafetensorsFile, write_safetensors


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
        "c.d": rng.normal(size=(2, 0, 3)).astype(np.float16),
        "e": np.float32(7.0).reshape(()),
        "f": rng.integers(0, 255, (2, 2)).astype(np.uint8),
    }
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {k: Planned(x.dtype, x.shape, lambda x=x: x) for k, x in arrays.items()})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    for name, x in arrays.items():
        view = file.view(name)
        assert (view.dtype, view.shape, view.tobytes()) == (x.dtype, x.shape, x.tobytes())
        assert not view.flags.writeable or not view.size
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("before")

    def fail():
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_safetensors(path, {"a": Planned(np.dtype(np.float32), (2,), fail)})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, b"1234567", r"cut short: tensor 'a' ends at byte 8 of 7"),
        ({"a": entry(0, 8)}, b"123456789", r"1 bytes behind its last tensor"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12, r"tensor 'b' starts at byte 4, expected 8"),
        ({"a": entry(0, 8), "b": entry(9, 17)}, b"0" * 17, r"tensor 'b' starts at byte 9, expected 8"),
        ({"a": entry(0, 12)}, b"0" * 12, r"tensor 'a' of shape \[2\] and dtype F32 needs 8 bytes"),
        ({"a": entry(0, 8, [-2])}, b"0" * 8, r"tensor 'a' has shape \[-2\]"),
        ({"a": entry(0, 8, [True, 2])}, b"0" * 8, r"tensor 'a' has shape"),
        ({"a": entry(0, 2**70, [2**68])}, b"", r"cut short: tensor 'a'"),
        ({"a": entry(0, 8, dtype="F33")}, b"0" * 8, r"tensor 'a' has the unknown dtype 'F33'"),
        ({"a": {"dtype": "F32"}}, b"", r"tensor 'a' needs dtype, shape and two data_offsets"),
        ({"a": 3}, b"", r"tensor 'a' needs"),
        (b'{"a": 1, "a": 2}', b"", r"'a' is there twice"),
        (b"[1]", b"", r"header is a list"),
        (b"{nonsense", b"", r"not valid JSON"),
        (b"[" * 100_000, b"", r"not valid JSON"),
        (b"\xff\xfe\xfd", b"", r"not valid JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path, header, data, message):
    with pytest.raises(HubError, match=message):
        SafetensorsFile(raw(tmp_path / "m.safetensors", header, data))


@pytest.mark.parametrize("content", [b"", b"1234567", (2**63).to_bytes(8, "little") + b"{}", b"\0" * 64])
def test_files_without_a_header_are_refused(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(HubError, match="not a complete safetensors file"):
        SafetensorsFile(tmp_path / "m.safetensors")


@given(st.binary(max_size=200), st.integers(0, 120))
def test_bytes_by_chance_are_read_or_refused(tmp_path_factory, content, cut):
    path = tmp_path_factory.mktemp("chance") / "m.safetensors"
    good = raw(path, {"a": entry(0, 8), "b": entry(8, 12, [2], "F16")}, b"0" * 12).read_bytes()
    for damaged in (content, good[:cut] + content + good[cut:], good[:cut]):
        path.write_bytes(damaged)
        try:
            file = SafetensorsFile(path)
        except HubError:
            continue
        for name in file.entries:
            file.view(name).tobytes()
