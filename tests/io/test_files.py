"""Atomic writes, digests, and safetensors files that notice every change."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qrlora_deploy.errors import FileFormatError, InputError, QrloraError
from qrlora_deploy.io.files import atomic_file, atomic_folder, digest_file, read_tensors, write_json, write_tensors
from qrlora_deploy.io.sealing import digest_arrays
from qrlora_deploy.io.versions import Versions

KIND = "qrlora-test"
RECORD = {"format": KIND, "format_version": 1}
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)

NAMES = st.text("abcXYZ._0189", min_size=1, max_size=8)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(width=32, allow_nan=False))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def anything(metadata: dict[str, Any], name: str, shape: tuple[int, ...]) -> bool:
    return True


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return read_tensors(path, KIND, Versions(1), anything)


def sample(path: Path) -> Path:
    write_tensors(path, {"a": np.arange(3, dtype=np.float32), "b": np.eye(2, dtype=np.float32)}, RECORD | {"x": "é"})
    return path


@SAME_FOLDER
@given(tensors=st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=3), extra=JSON)
def test_write_then_read_is_the_identity(tmp_path: Path, tensors: dict[str, np.ndarray], extra: Any) -> None:
    metadata = RECORD | {"extra": extra}
    path = tmp_path / "file.safetensors"
    write_tensors(path, tensors, metadata)
    found, record = read(path)
    assert record == metadata and found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].shape == array.shape and found[name].tobytes() == array.tobytes()
    first = path.read_bytes()
    write_tensors(path, dict(reversed(tensors.items())), metadata)
    assert path.read_bytes() == first, "the same content gives the same bytes"


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole = sample(tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"cut\.safetensors"):
            read(cut)
    for tail in (b"\0", b"more"):
        cut.write_bytes(whole + tail)
        with pytest.raises(FileFormatError):
            read(cut)


@SAME_FOLDER
@given(data=st.data())
def test_a_changed_byte_is_refused_or_reads_the_same(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "file.safetensors"
    original = bytearray(sample(path).read_bytes())
    expected, record = read(path)
    place = data.draw(st.integers(0, len(original) - 1))
    original[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(original)
    try:
        found, changed = read(path)
    except FileFormatError:
        return
    # JSON has insignificant spaces and case-insensitive escapes: same meaning, other bytes.
    assert changed == record
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in expected.items()}


def test_every_bit_of_the_tensors_is_covered(tmp_path: Path) -> None:
    whole = sample(tmp_path / "file.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in range(start, len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            (tmp_path / "changed.safetensors").write_bytes(changed)
            with pytest.raises(FileFormatError, match="was changed"):
                read(tmp_path / "changed.safetensors")


def raw(path: Path, header: Any, body: bytes = b"") -> Path:
    """A file with a header of our own making."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


HUGE = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
OVERLAP = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "header",
    [
        {"a": HUGE},
        {"a": OVERLAP, "b": OVERLAP},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"__metadata__": {"qrlora": DEEP}, "a": OVERLAP},
        {"__metadata__": {"qrlora": "[1]"}, "a": OVERLAP},
        {"__metadata__": {"qrlora": "null"}, "a": OVERLAP},
        {"__metadata__": {"qrlora": json.dumps(RECORD), "more": "1"}, "a": OVERLAP},
        {"__metadata__": {"qrlora": json.dumps(RECORD | {"format_version": 2})}, "a": OVERLAP},
        {"__metadata__": {"qrlora": json.dumps(RECORD | {"format": "other"})}, "a": OVERLAP},
        {"__metadata__": {"qrlora": json.dumps(RECORD)}, "a": OVERLAP},
        {"a": OVERLAP},
        b"\xff\xfe",
        b"{" * 1000,
    ],
    ids=lambda header: str(header)[:50],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(FileFormatError, match=r"bad\.safetensors"):
        read(raw(tmp_path / "bad.safetensors", header, b"\0\0\0\0"))


def test_a_header_longer_than_the_file_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(FileFormatError):
        read(tmp_path / "bad.safetensors")


def test_other_dtypes_and_unwanted_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(safetensors.numpy.save({"a": np.ones(2)}, {"qrlora": json.dumps(RECORD)}))
    with pytest.raises(FileFormatError, match=r"unexpected tensor 'a' F64\[2\]"):
        read(path)
    sample(path)
    with pytest.raises(FileFormatError, match=r"unexpected tensor 'b' F32\[2, 2\]"):
        read_tensors(path, KIND, Versions(1), lambda metadata, name, shape: name == "a")


def test_missing_file_and_folder_are_input_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            read(path)


def test_nan_in_the_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_tensors(tmp_path / "f", {"a": np.ones(1, np.float32)}, RECORD | {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(QrloraError, match="No space left"), atomic_file(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match="No space left"), atomic_file(tmp_path / "file") as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from qrlora_deploy.io.files import atomic_file, atomic_folder
path = Path(sys.argv[1])
with (atomic_folder if sys.argv[2] == "folder" else atomic_file)(path) as temporary:
    (temporary / "part" if sys.argv[2] == "folder" else temporary).write_text("half of the new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_in_the_middle_of_a_write(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    if kind == "file":
        path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], timeout=60)
    assert done.returncode == -signal.SIGKILL
    if kind == "file":
        assert path.read_text() == "old"
        with atomic_file(path) as temporary:
            temporary.write_text("new")
        assert path.read_text() == "new"
    else:
        assert not path.exists()


def test_folders_are_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
    assert (target / "sub" / "file").read_text() == "x"
    with pytest.raises(InputError, match="already exists"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "other"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208 - names, hidden ones too


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "file", "does not exist")):
        with pytest.raises(InputError, match=message), atomic_file(path):
            pass
    with pytest.raises(InputError, match="does not exist"), atomic_folder(tmp_path / "no" / "folder"):
        pass


def test_json_and_digests_are_reproducible(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5]})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "a": [\n    1.5\n  ],\n  "b": 1\n}\n'
    assert digest_file(tmp_path / "a.json") == "0106ddb6aa0c4fe2de32cec5c3f6c6c33e48536ae1f152c0ec23e67087020c92"
    one = np.arange(4, dtype=np.float32)
    digests = {
        digest_arrays({"a": one}),
        digest_arrays({"b": one}),
        digest_arrays({"a": one.reshape(2, 2)}),
        digest_arrays({"a": one.astype(np.float64)}),
        digest_arrays({"a": one[::-1]}),
    }
    assert len(digests) == 5
    assert digest_arrays({"a": np.asfortranarray(one.reshape(2, 2))}) == digest_arrays({"a": one.reshape(2, 2)})
