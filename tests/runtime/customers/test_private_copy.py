"""Customers' files are never mapped where others may cut them, and are read with as much memory as they are long."""

import os
from pathlib import Path

import pytest

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.formats import customer_files
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients_content, write_coefficients
from qrlora_deploy.formats.customer_files import read_customer, read_customer_file
from tests.runtime.place import Place


def status_with(path: Path, **changed: int) -> os.stat_result:
    """The status of a file, with some of its fields changed."""
    names = [
        "st_mode",
        "st_ino",
        "st_dev",
        "st_nlink",
        "st_uid",
        "st_gid",
        "st_size",
        "st_atime",
        "st_mtime",
        "st_ctime",
    ]
    status = path.stat()
    return os.stat_result([changed.get(name, getattr(status, name)) for name in names])


@pytest.mark.parametrize("by", ["store", "session"])
def test_what_is_parsed_is_what_was_read(place: Place, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    place.put("acme", 2)
    read = []

    def looks(content: bytes, shown: Path | str) -> Coefficients:
        assert content == place.path("acme").read_bytes()
        read.append(shown)
        return read_coefficients_content(content, shown)

    monkeypatch.setattr(customer_files, "read_coefficients_content", looks)
    if by == "store":
        place.store()
    else:
        place.session.load("acme", place.path("acme"))
    assert place.logits("acme") == place.expected(2) and list(map(str, read)) == [str(place.path("acme"))]


@pytest.mark.parametrize(("more", "message"), [(1, "is cut"), (-1, "grew while it was read")])
def test_a_file_that_changes_its_length_while_it_is_read_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, more: int, message: str
) -> None:
    """Its length is asked first; another one is found when it is read."""
    place.put("acme", 2)
    place.session.load("acme", place.version(1))
    path = place.path("acme")
    status = status_with(path, st_size=path.stat().st_size + more)
    monkeypatch.setattr(customer_files.os, "fstat", lambda _: status)
    with pytest.raises(FileFormatError, match=rf"acme\.safetensors .*{message}"):
        place.session.load("acme", path)
    monkeypatch.undo()
    assert place.logits("acme") == place.expected(1), "the old version goes on"


def test_no_read_asks_for_more_than_the_file_is_long(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put("acme", 1)
    asked: list[int] = []
    reading = os.read

    def read(descriptor: int, count: int) -> bytes:
        asked.append(count)
        return reading(descriptor, min(count, 100))

    monkeypatch.setattr(customer_files.os, "read", read)
    size = place.path("acme").stat().st_size
    assert read_customer(place.folder, "acme").digest == place.customer.digest
    # However little comes at once.
    assert asked == [size + 1 - done for done in range(0, size, 100)]


def test_what_is_no_plain_file_is_refused_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = place.path("pipe")
    os.mkfifo(pipe)
    for path in (pipe, place.folder, Path("/dev/null"), place.path("missing")):
        with pytest.raises(InputError, match="no such file"):
            place.session.load("acme", path)
    # One that took the place of a file after it was looked at: nobody writes to it.
    monkeypatch.setattr(customer_files.os.path, "isfile", lambda _: True)
    with pytest.raises(InputError, match="is no plain file"):
        read_customer_file(pipe)


def test_a_link_that_leads_out_is_refused_with_the_remedy(place: Place, tmp_path: Path) -> None:
    """As in the hub's cache, where files are links to blobs."""
    (tmp_path / "blobs").mkdir()
    place.put("acme", 1)
    place.path("acme").rename(tmp_path / "blobs" / "0f")
    place.path("acme").symlink_to("../blobs/0f")
    with pytest.raises(InputError, match=r"leads out of the folder, to .*0f; .*snapshot_download\(local_dir=\.\.\.\)"):
        read_customer(place.folder, "acme")


@pytest.mark.parametrize("told", [True, False], ids=["the system tells", "it does not"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_becomes_a_link_after_it_was_looked_up_is_not_followed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool, what: str
) -> None:
    """The file, or the folder of a version that a link leads to, is swapped between the look and the opening."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    (inside / "v1").mkdir(parents=True)
    outside.mkdir()
    for folder, version in ((inside / "v1", 1), (outside, 2)):
        write_coefficients(place.version(version), folder / "acme.safetensors")
    (inside / "acme.safetensors").symlink_to(Path("v1") / "acme.safetensors")
    swapped = inside / "v1" / "acme.safetensors" if what == "file" else inside / "v1"
    leads_to = outside / "acme.safetensors" if what == "file" else outside
    opening = customer_files._open_at_once

    def swap(path: str, flags: int) -> int:
        swapped.rename(tmp_path / "away")
        swapped.symlink_to(leads_to)
        return opening(path, flags)

    monkeypatch.setattr(customer_files, "_open_at_once", swap)
    if not told:
        monkeypatch.setattr(customer_files, "OPEN_FILES", tmp_path / "none")
    with pytest.raises(InputError, match="leads out of the folder, to .*outside"):
        read_customer(inside, "acme")


def test_a_file_that_is_replaced_after_it_was_opened_is_the_one_that_was_opened(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that renames a new version over the old one is no attack, and no reason to refuse."""
    path, newer = tmp_path / "acme.safetensors", tmp_path / "newer"
    write_coefficients(place.version(1), path)
    write_coefficients(place.version(2), newer)
    opening = customer_files._open_at_once

    def swap(name: str, flags: int) -> int:
        descriptor = opening(name, flags)
        newer.replace(path)
        return descriptor

    monkeypatch.setattr(customer_files, "_open_at_once", swap)
    assert read_customer(tmp_path, "acme").digest == place.version(1).digest
