"""Which versions of a format are read, and how older records become ones of today."""

from pathlib import Path
from typing import Any

import pytest

from qrlora_deploy.bench import report
from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.formats import basis, coefficients, provenance
from qrlora_deploy.io.versions import Versions
from qrlora_deploy.runtime.bundle import manifest
from qrlora_deploy.runtime.customers import packed_header

FILE = Path("f.bin")


def doubled(record: dict[str, Any]) -> dict[str, Any]:
    if "size" not in record:
        raise InputError("size is missing")
    return {"name": record["name"], "sizes": [record["size"]] * 2}


def summed(record: dict[str, Any]) -> dict[str, Any]:
    return {"name": record["name"], "sum": sum(record["sizes"])}


THREE = Versions(3, {1: doubled, 2: summed})


@pytest.mark.parametrize("found", [True, 1.0, "1", None, 0, -1, [1], "y" * 50_000])
def test_a_version_is_a_whole_number_and_no_other(found: object) -> None:
    with pytest.raises(FileFormatError, match="f.bin has format version .*; this version reads 1$") as caught:
        Versions(1).check(FILE, found)
    assert len(str(caught.value)) < 200
    Versions(1).check(FILE, 1)


def test_a_newer_file_is_refused_with_what_is_read_and_what_to_do() -> None:
    with pytest.raises(FileFormatError, match="f.bin has format version 4; this version reads 1 and 2 and 3; update q"):
        THREE.check(FILE, 4)
    with pytest.raises(FileFormatError, match="format version 3; this version reads 2; update qrlora-deploy"):
        Versions(2, remedy="pack it again").check(FILE, 3)


def test_an_older_file_without_steps_is_refused_with_its_remedy() -> None:
    with pytest.raises(FileFormatError, match="format version 1; this version reads 2; pack it again"):
        Versions(2, remedy="pack it again").check(FILE, 1)
    assert Versions(3, {1: doubled}).known == (3,)
    assert Versions(3, {2: summed}).known == (2, 3)


def test_a_record_goes_through_every_step_and_stays_as_it_is() -> None:
    old = {"format_version": 1, "name": "a", "size": 4}
    assert THREE.upgraded(FILE, old, "wrong") == {"format_version": 3, "name": "a", "sum": 8}
    assert old == {"format_version": 1, "name": "a", "size": 4}
    middle = {"format_version": 2, "name": "a", "sizes": [1, 2]}
    assert THREE.upgraded(FILE, middle, "wrong") == {"format_version": 3, "name": "a", "sum": 3}
    today = {"format_version": 3, "anything": None}
    assert THREE.upgraded(FILE, today, "wrong") == today


def test_a_record_that_is_none_of_its_version_is_refused_with_the_file() -> None:
    with pytest.raises(FileFormatError, match="f.bin is damaged: size is missing"):
        THREE.upgraded(FILE, {"format_version": 1, "name": "a"}, "f.bin is damaged")
    with pytest.raises(FileFormatError, match="f.bin has format version None"):
        THREE.upgraded(FILE, {}, "f.bin is damaged")


def test_every_format_reads_the_versions_that_were_promised() -> None:
    # docs/versions.md: what a newer release reads. A version leaves this list in no release.
    assert basis.VERSIONS.known == (1, 2)
    assert coefficients.VERSIONS.known == (1, 2)
    assert manifest.VERSIONS.known == (1,)
    assert provenance.VERSIONS.known == (1,)
    assert packed_header.VERSIONS.known == (2, 3)
    assert report.VERSIONS.known == (1,)
