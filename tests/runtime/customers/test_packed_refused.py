"""Packed files that were changed, cut, forged or made of what does not fit."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.bundle.bundle import Manifest
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.packed_check import check_packed
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.runtime.customers.packing import SAME_FOLDER, empty, forged, refuse


@SAME_FOLDER
@given(data=st.data())
def test_any_changed_byte_is_refused(session: SwitchableSession, sample: Path, data: st.DataObject) -> None:
    changed = bytearray(sample.read_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    # Where it is the basis that is named, that is what is complained of.
    refuse(empty(session), sample, bytes(changed), InputError)


def test_every_byte_of_the_header_and_the_ids_counts(session: SwitchableSession, sample: Path) -> None:
    whole = sample.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    assert header == 4096 and whole[8:header].strip(b" ")[-1:] == b"}"
    for place in [*range(header), *range(len(whole) - 180, len(whole))]:
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        refuse(empty(session), sample, changed, InputError)


@SAME_FOLDER
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(session: SwitchableSession, sample: Path, data: st.DataObject) -> None:
    whole = sample.read_bytes()
    refuse(empty(session), sample, whole[: data.draw(st.integers(0, len(whole) - 1))])
    refuse(session, sample, whole + data.draw(st.binary(min_size=1, max_size=9)))


FORGED: dict[str, tuple[list[bytes], dict[str, Any], str]] = {
    "path": ([b"../x", b"b"], {}, "is no customer id"),
    "hidden": ([b".x", b"b"], {}, "is no customer id"),
    "nul": ([b"a\0", b"b"], {}, "is no customer id"),
    "empty": ([b"", b"b"], {}, "make no sense"),
    "long": ([b"x" * 129, b"b"], {}, "make no sense"),
    "latin": ([b"\xe9", b"b"], {}, "is no customer id"),
    "twice": ([b"b", b"b"], {}, "the customer b occurs twice"),
    "version": ([b"a", b"b"], {"format_version": 1}, "format version 1; this version reads 2 and 3; pack it again"),
    "kind": ([b"a", b"b"], {"format": "qrlora-basis"}, "is not a qrlora-packed file"),
    "task": ([b"a", b"b"], {"task": "text-regression"}, "another task"),
    "labels": ([b"a", b"b"], {"labels": ["x"]}, "other labels"),
    "more metadata": ([b"a", b"b"], {"extra": 1}, "another task"),
    "huge": ([b"a", b"b"], {"sizes": (10**14, 10**14, 10**14)}, "is cut"),
    "negative": ([b"a", b"b"], {"sizes": (-1, 10, 2)}, "is not a qrlora-packed file"),
    "none": ([b"a", b"b"], {"sizes": (0, 10, 2)}, "is not a qrlora-packed file"),
    "true": ([b"a", b"b"], {"sizes": (True, 10, 2)}, "is not a qrlora-packed file"),
}


def ends(*rows: int, value: float = 0.5) -> tuple[int, bytes]:
    """How many customers have thresholds, and the end of the file that says which."""
    return len(rows), struct.pack(f"<{len(rows)}q", *rows) + struct.pack("<d", value) * 4 * len(rows)


FORGED |= {
    "thresholds of nobody": ([b"a", b"b"], {"tuned": ends(2)}, "thresholds of customers that are not there"),
    "thresholds before all": ([b"a", b"b"], {"tuned": ends(-1)}, "thresholds of customers that are not there"),
    "thresholds twice": ([b"a", b"b"], {"tuned": ends(1, 1)}, "thresholds of customers that are not there"),
    "thresholds of 1": ([b"a", b"b"], {"tuned": ends(0, value=1.0)}, "between 0 and 1, not 1.0"),
    "thresholds of nan": ([b"a", b"b"], {"tuned": ends(0, value=float("nan"))}, "between 0 and 1, not nan"),
    "thresholds too early": ([b"a", b"b"], {"tuned": ends(0), "format_version": 2}, "has bytes too many"),
    "negative thresholds": ([b"a", b"b"], {"tuned": (-1, b"")}, "is not a qrlora-packed file"),
}


def test_a_file_of_version_2_is_read(fresh: SwitchableSession, tmp_path: Path) -> None:
    values = np.ones((2, fresh.layout.total_rank), np.float32)
    path = tmp_path / "older.safetensors"
    path.write_bytes(forged(fresh, values, [b"a", b"b"], format_version=2))
    assert "threshold_rows" not in safetensors.numpy.load_file(path)
    assert load_packed(fresh, path) == 2 and fresh.customers() == ["a", "b"]
    assert check_packed(path).customers == 2


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused(session: SwitchableSession, sample: Path, case: str) -> None:
    names, changes, message = FORGED[case]
    values = np.ones((2, session.layout.total_rank), np.float32)
    assert message in refuse(empty(session), sample, forged(session, values, names, **changes), InputError)


def test_nan_another_bundle_and_other_files_are_refused(
    session: SwitchableSession, sample: Path, tiny_customer_file: Path
) -> None:
    values = np.ones((2, session.layout.total_rank), np.float32)
    values[1, 3] = np.inf
    assert "NaN or Inf" in refuse(empty(session), sample, forged(session, values, [b"a", b"b"]))
    for name in ("basis_digest", "base_digest"):
        content = forged(session, np.ones_like(values), [b"a", b"b"], **{name: "e" * 64})
        assert f"{name} eeeeeeeeeeee" in refuse(session, sample, content, BasisMismatchError)
    content = forged(session, np.ones((2, 5), np.float32), [b"a", b"b"])
    assert "another number of coefficients" in refuse(session, sample, content, InputError)
    assert "is not a qrlora-packed file" in refuse(session, sample, tiny_customer_file.read_bytes())
    for text in (b"[]", b'{"__metadata__": {"qrlora": "[]"}}', b"[" * 5000, b"\xff"):
        refuse(session, sample, struct.pack("<Q", len(text)) + text)
    refuse(session, sample, struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(InputError, match=r"none\.safetensors cannot be read: No such file"):
        load_packed(session, sample.with_name("none.safetensors"))


UNFIT: dict[str, tuple[Callable[[Coefficients], Coefficients], str]] = {
    "head": (lambda it: replace(it, head={"w": np.ones((4, 32), np.float32)}), "acme has a head of its own"),
    "basis": (lambda it: replace(it, basis_digest="e" * 64), "acme was trained on basis eeeeeeeeeeee"),
    "base": (lambda it: replace(it, base_digest="e" * 64), "acme was trained on base eeeeeeeeeeee"),
    "task": (lambda it: replace(it, task="text-regression"), "acme is a text-regression"),
    "labels": (lambda it: replace(it, labels=("x",)), "acme has other labels"),
    "length": (lambda it: replace(it, values=it.values[1:]), "acme: expected"),
    "nan": (lambda it: replace(it, values=it.values * np.float32("nan")), "acme holds NaN"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_customer_that_does_not_fit_is_named(
    tmp_path: Path, manifest: Manifest, tiny_customer: Coefficients, case: str
) -> None:
    change, message = UNFIT[case]
    path = tmp_path / "packed.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=message):
        write_packed([("fine", tiny_customer), ("acme", change(tiny_customer))], path, manifest)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nothing_twice_and_hostile_names_are_not_packed(
    tmp_path: Path, manifest: Manifest, tiny_customer: Coefficients
) -> None:
    path = tmp_path / "packed.safetensors"
    for names, message in (
        (["a", "b", "a"], "a occurs twice"),
        (["../a"], "is no customer id"),
        ([], "no customer to pack"),
    ):
        with pytest.raises(InputError, match=message):
            write_packed([(name, tiny_customer) for name in names], path, manifest)
    (tmp_path / "bad").mkdir()
    with pytest.raises(InputError, match="no customer to pack in .*bad"):
        write_packed(tmp_path / "bad", path, manifest)
    (tmp_path / "bad" / "x.safetensors").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"bad/x\.safetensors"):
        write_packed(tmp_path / "bad", path, manifest)
    assert not path.exists()
