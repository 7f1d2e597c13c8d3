"""A folder of customers that is written to: what comes is checked, what goes is kept, nothing leads out of it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError, MalformedInputError, QrloraError
from qrlora_deploy.errors import UnknownCustomerError as Unknown
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.runtime.customers.store import CustomerStore
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.customer_folder import CustomerFolder, UnknownVersionError
from qrlora_deploy.serving.refusals import TooLargeError
from tests.serving.conftest import own_head

Content = Callable[..., bytes]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "customers").mkdir()
    return tmp_path / "customers"


@pytest.fixture
def folder(place: Path, session: SwitchableSession) -> CustomerFolder:
    return CustomerFolder(place, session.check, keep=3)


@pytest.fixture
def content(tmp_path: Path, tiny_customer: Coefficients) -> Content:
    """The bytes of a customer's file, with the values times a factor."""

    def make(factor: float = 1.0, **changes: object) -> bytes:
        values = tiny_customer.values * np.float32(factor)
        write_coefficients(replace(tiny_customer, values=values, **changes), tmp_path / "made.safetensors")  # type: ignore[arg-type]
        return (tmp_path / "made.safetensors").read_bytes()

    return make


def test_what_is_put_is_what_the_store_serves(
    place: Path, folder: CustomerFolder, session: SwitchableSession, content: Content
) -> None:
    changed = folder.put("acme", content(2.0))
    assert (place / "acme.safetensors").read_bytes() == content(2.0)
    assert read_coefficients(place / "acme.safetensors").digest == changed.digest
    store = CustomerStore(session, place)
    store.fetch("acme")
    assert session.holds("acme", read_coefficients(place / "acme.safetensors"))
    assert store.customers() == folder.customers() == ["acme"]


def test_versions_are_kept_and_rolled_back_to(place: Path, folder: CustomerFolder, content: Content) -> None:
    # Somebody copied the first one into the folder.
    (place / "acme.safetensors").write_bytes(content(1.0))
    names = {factor: folder.put("acme", content(factor)).version for factor in (2.0, 3.0)}
    listed = folder.versions("acme")
    assert [item.is_current for item in listed] == [True, False, False]
    assert [item.name for item in listed[:2]] == [names[3.0], names[2.0]] == sorted(names.values(), reverse=True)
    for factor in (2.0, 1.0):
        folder.roll_back("acme")
        assert (place / "acme.safetensors").read_bytes() == content(factor)
    with pytest.raises(UnknownVersionError, match="older"):
        folder.roll_back("acme")
    assert folder.roll_back("acme", names[3.0]).version == names[3.0]
    assert (place / "acme.safetensors").read_bytes() == content(3.0)
    folder.put("acme", content(4.0))
    assert len(folder.versions("acme")) == 3
    # A version that is put again is kept once.
    folder.put("acme", content(3.0))
    assert len(folder.versions("acme")) == 3 and folder.versions("acme")[0].is_current


def test_what_is_deleted_can_be_brought_back_until_it_is_erased(
    place: Path, folder: CustomerFolder, content: Content
) -> None:
    (place / "acme.safetensors").write_bytes(content(1.0))
    folder.delete("acme")
    assert folder.customers() == []
    with pytest.raises(Unknown):
        folder.delete("acme")
    folder.roll_back("acme")
    assert (place / "acme.safetensors").read_bytes() == content(1.0)
    folder.erase("acme")
    assert folder.customers() == [] and not (place / ".versions" / "acme").exists()
    for gone in (folder.versions, folder.roll_back, folder.erase, folder.delete):
        with pytest.raises(Unknown):
            gone("acme")


def test_who_is_erased_is_taken_from_elsewhere_too(place: Path, session: SwitchableSession, content: Content) -> None:
    seen: list[tuple[str, bool]] = []

    def elsewhere(customer: str) -> bool:
        seen.append((customer, (place / f"{customer}.safetensors").exists()))
        return customer == "packed"

    folder = CustomerFolder(place, session.check, elsewhere=elsewhere)
    folder.put("acme", content())
    folder.erase("acme")
    folder.erase("packed")
    with pytest.raises(Unknown):
        folder.erase("nobody")
    assert seen == [("acme", False), ("packed", False), ("nobody", False)]


def test_ids_are_listed_some_at_a_time(folder: CustomerFolder, place: Path, content: Content) -> None:
    for name in ("c", "a", "b", "d"):
        folder.put(name, content())
    (place / "note.txt").write_text("")
    assert folder.customers(limit=2) == ["a", "b"] and folder.customers(after="b") == ["c", "d"]


def test_what_no_store_would_serve_never_gets_there(
    place: Path, folder: CustomerFolder, content: Content, tiny_customer: Coefficients
) -> None:
    folder.put("acme", content())
    before = sorted(path.relative_to(place) for path in place.rglob("*"))
    whole = content()
    head = own_head(tiny_customer, tuple(map(str, range(50))))
    refused: list[tuple[bytes, type[QrloraError]]] = [
        (b"", FileFormatError),
        (b"\x80\x04\x95pickle", FileFormatError),
        (whole[:-1], FileFormatError),
        (whole[:-2] + b"\xff\xff", FileFormatError),
        (content(basis_digest="0" * 64), BasisMismatchError),
        (content(base_digest="0" * 64), BasisMismatchError),
        (content(labels=("one", "two")), InputError),
        (content(labels=head.labels, head=head.head), InputError),
        (b"\0" * (folder.max_file_bytes + 1), TooLargeError),
    ]
    for wrong, kind in refused:
        with pytest.raises(kind) as caught:
            folder.put("acme", wrong)
        assert str(place) not in str(caught.value) and "\n" not in str(caught.value)
        assert (place / "acme.safetensors").read_bytes() == whole
    assert sorted(path.relative_to(place) for path in place.rglob("*")) == before


@pytest.mark.parametrize("name", ["", ".", "..", "../acme", "a/b", "/etc/x", ".versions", "a\0b", "a\nb", "x" * 129])
def test_a_name_that_is_none_is_never_a_path(folder: CustomerFolder, content: Content, name: str) -> None:
    for ask in (lambda: folder.put(name, content()), lambda: folder.delete(name), lambda: folder.erase(name)):
        with pytest.raises(MalformedInputError):
            ask()
    with pytest.raises(MalformedInputError):
        folder.versions(name)
    folder.put("acme", content())
    with pytest.raises(UnknownVersionError):
        folder.roll_back("acme", name or "/etc/passwd")


def test_links_are_not_followed_out_of_the_folder(
    tmp_path: Path, place: Path, folder: CustomerFolder, content: Content
) -> None:
    outside = tmp_path / "secret.safetensors"
    outside.write_bytes(content(5.0))
    (place / "acme.safetensors").symlink_to(outside)
    changed = folder.put("acme", content(2.0))
    assert outside.read_bytes() == content(5.0) and not (place / "acme.safetensors").is_symlink()
    assert [item.name for item in folder.versions("acme")] == [changed.version]


def test_a_foreign_file_among_the_versions_is_passed_over(
    place: Path, folder: CustomerFolder, content: Content
) -> None:
    changed = folder.put("acme", content())
    for name in ("note-x.safetensors", "readme", "1-.txt"):
        (place / ".versions" / "acme" / name).write_text("")
    assert [item.name for item in folder.versions("acme")] == [changed.version]
    os.truncate(place / ".versions" / "acme" / f"{changed.version}.safetensors", 10)
    (place / "acme.safetensors").unlink()
    with pytest.raises(FileFormatError):
        folder.roll_back("acme")
    assert folder.customers() == []


def test_a_copy_of_the_folder_is_a_backup(
    tmp_path: Path, place: Path, folder: CustomerFolder, session: SwitchableSession, content: Content
) -> None:
    for factor in (1.0, 2.0):
        folder.put("acme", content(factor))
    folder.put("bolt", content(3.0))
    folder.delete("bolt")
    shutil.copytree(place, tmp_path / "backup")
    for name in ("acme", "bolt"):
        folder.erase(name)
    shutil.copytree(tmp_path / "backup", place, dirs_exist_ok=True)
    restored = CustomerFolder(place, session.check)
    assert restored.customers() == ["acme"] and (place / "acme.safetensors").read_bytes() == content(2.0)
    restored.roll_back("acme")
    restored.roll_back("bolt")
    assert (place / "acme.safetensors").read_bytes() == content(1.0)
    assert (place / "bolt.safetensors").read_bytes() == content(3.0)


def write_and_be_killed(path: Path) -> None:
    """A process that is killed while it writes a file, and what it has written."""
    program = (
        "import os, pathlib, sys\n"
        "from qrlora_deploy.io.files import atomic_file\n"
        "with atomic_file(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'secret')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], timeout=60).returncode == -9
    assert any(left.read_bytes() == b"secret" for left in path.parent.rglob(path.name))


def test_what_a_killed_process_left_of_the_customer_is_erased_too(
    place: Path, folder: CustomerFolder, content: Content
) -> None:
    folder.put("acme", content())
    write_and_be_killed(place / "acme.safetensors")
    folder.erase("acme")
    assert [path for path in place.rglob("*") if path.is_file()] == []


def test_what_killed_processes_left_goes_and_what_is_being_written_stays(
    place: Path, folder: CustomerFolder, session: SwitchableSession, content: Content
) -> None:
    version = folder.put("acme", content()).version
    write_and_be_killed(place / "bolt.safetensors")
    write_and_be_killed(place / "other.txt")
    write_and_be_killed(place / ".versions" / "acme" / f"{version}.safetensors")
    with atomic_file(place / "late.safetensors") as writing:
        writing.write_bytes(content(3.0))
        again = CustomerFolder(place, session.check)
        assert not list(place.glob(".bolt.*")) and list(place.glob(".other.txt.*")), "not what is no customer's"
    assert again.customers() == ["acme", "late"] and (place / "late.safetensors").read_bytes() == content(3.0)
    again.put("acme", content(2.0))
    assert not list((place / ".versions" / "acme").glob(".*"))
    assert len(again.versions("acme")) == 2


def test_files_that_somebody_else_takes_away_meanwhile_are_no_failure(
    place: Path, folder: CustomerFolder, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put("acme", content())
    keep = folder._keep_current

    def taken_away(customer: str) -> None:
        keep(customer)
        (place / "acme.safetensors").unlink()

    monkeypatch.setattr(folder, "_keep_current", taken_away)
    folder.delete("acme")
    assert folder.customers() == []


def test_what_is_no_version_is_passed_over(place: Path, folder: CustomerFolder, content: Content) -> None:
    folder.put("acme", content(1.0))
    folder.put("acme", content(2.0))
    kept = place / ".versions" / "acme"
    (kept / "00000000000001-abcdabcdabcdabcd.safetensors").mkdir()
    (kept / "00000000000002-abcdabcdabcdabcd.safetensors").symlink_to("nowhere")
    (kept / f"{'9' * 30}-abcdabcdabcdabcd.safetensors").write_bytes(content(3.0))
    assert len(folder.versions("acme")) == 2
    folder.roll_back("acme")
    assert (place / "acme.safetensors").read_bytes() == content(1.0)


def test_what_the_system_says_of_a_folder_is_one_line(place: Path, folder: CustomerFolder, content: Content) -> None:
    (place / ".versions").write_bytes(b"")
    with pytest.raises(QrloraError, match="the files of acme cannot be changed: "):
        folder.put("acme", content())
    assert not (place / "acme.safetensors").exists()
