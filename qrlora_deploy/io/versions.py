"""Versions of a file format: which of them are read, and how an older record becomes one of today."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrlora_deploy.errors import FileFormatError, InputError

Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
"""From the record of one version to that of the next; InputError, without the file's name, where it is none of its
version."""


@dataclass(frozen=True)
class Versions:
    """The versions of a format that are read.

    Readers know the current version alone; the record of an older file goes through one step a version first. So an
    old version costs its step, and a new one is a number and the step that leads to it.

    Attributes:
        current: the version that is written.
        upgrades: by version, the step to the next one. A version is read from which the steps lead to `current`.
        remedy: what to do about a file of an older version that is not read.
    """

    current: int
    upgrades: Mapping[int, Upgrade] = field(default_factory=dict)
    remedy: str = ""

    @property
    def known(self) -> tuple[int, ...]:
        """The versions that are read, in order."""
        oldest = self.current
        while oldest - 1 in self.upgrades:
            oldest -= 1
        return tuple(range(oldest, self.current + 1))

    def check(self, path: Path | str, found: Any) -> None:
        """Make sure that a file has a version that is read; true and 1.0 are none.

        Raises:
            FileFormatError: it has another one; the message names those that are read.
        """
        if type(found) is int and found in self.known:
            return
        newer = type(found) is int and found > self.current
        remedy = "update qrlora-deploy" if newer else self.remedy
        line = f"{path} has format version {found!r:.40}; this version reads {' and '.join(map(str, self.known))}"
        raise FileFormatError(f"{line}; {remedy}" if remedy else line)

    def upgraded(self, path: Path | str, record: dict[str, Any], what: str) -> dict[str, Any]:
        """The record of a file of any version that is read, as the current version has it.

        Args:
            path: the file.
            record: with its `format_version`; it stays as it is.
            what: the file and what is wrong with it where the record is none of its version.

        Raises:
            FileFormatError: it has another version, or is none of its own.
        """
        self.check(path, record.get("format_version"))
        try:
            for version in range(record["format_version"], self.current):
                record = self.upgrades[version](record) | {"format_version": version + 1}
        except InputError as error:
            raise FileFormatError(f"{what}: {error}") from error
        return record
