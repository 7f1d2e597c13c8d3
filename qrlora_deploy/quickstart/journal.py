"""A quickstart that may be interrupted: what its steps made is kept beside the folder that is to come."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.io.files import publish_folder, write_json
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.io.reading import readable
from qrlora_deploy.io.temporary import scratch_folder
from qrlora_deploy.training.checkpoints import run_folder

MADE, JOURNAL = "made", "journal.json"


class Entries(BaseModel):
    """What is remembered of a quickstart.

    Attributes:
        marks: what an interrupted run and the one that goes on must have in common.
        seconds: of each step so far, in order.
        scores: results that are no files, by customer.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    marks: dict[str, str | int]
    seconds: dict[str, float] = {}
    scores: dict[str, dict[str, Any]] = {}


class Journal:
    """The entries of a quickstart in a file, which is written whenever something is done.

    Args:
        file: read where it is there.
        marks: of this run.

    Raises:
        InputError: the file is of a run with other marks, or damaged.
    """

    def __init__(self, file: Path, marks: dict[str, str | int]) -> None:
        self.file = file
        self.entries = _read(file) if file.is_file() else Entries(marks=marks)
        changed = sorted(name for name in marks if self.entries.marks.get(name) != marks[name])
        if changed:
            raise InputError(
                f"{file.parent} holds a quickstart with other settings ({', '.join(changed)}); give the same ones, or "
                f"remove {file.parent} and leave out {argument('resume', True)}"
            )

    def save(self) -> None:
        """Write it down."""
        write_json(self.file, self.entries.model_dump())


def _read(file: Path) -> Entries:
    with readable(file):
        text = file.read_bytes()
    try:
        return Entries.model_validate_json(text)
    except ValidationError as error:
        raise InputError(
            f"{file} is damaged; remove {file.parent} and start again without {argument('resume', True)}"
        ) from error


@contextmanager
def resumable_folder(out: Path | None, resume: bool) -> Iterator[Path]:
    """A folder whose `MADE` becomes `out` when all went well, and which is kept for `resume` where it did not.

    Args:
        out: a new folder; None: a temporary one is used and removed.
        resume: go on with what an interrupted run left.

    Raises:
        InputError: `out` holds something, or there is nothing to go on with, or there is and nobody asked for it.
    """
    if out is None:
        if resume:
            raise InputError(f"{argument('resume', True)}: give {argument('output')} of the run to go on with")
        with scratch_folder() as folder:
            (folder / MADE).mkdir()
            yield folder
        return
    check_free_folder(out)
    with run_folder(out, resume, holds_work) as folder:
        (folder / MADE).mkdir(exist_ok=True)
        yield folder
        publish_folder(folder / MADE, out)


def holds_work(folder: Path) -> bool:
    """Whether something was made in such a folder."""
    return (folder / MADE).is_dir() and any((folder / MADE).iterdir())
