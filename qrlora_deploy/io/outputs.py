"""What may be written to: asked before long work starts, and again when it is done.

A finished output is renamed into its place. That would put a plain file where a device or a pipe
was, which is why nothing but plain files and empty folders is ever replaced.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.io.temporary import remove_dead

DEVICES, PROCESSES = Path("/dev"), Path("/proc")

KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def check_free_folder(path: Path) -> None:
    """Refuse an output folder that already holds something or cannot be made, before long work starts.

    What a dead process left of writing the same folder is removed.

    Raises:
        InputError: saying which.
    """
    _refuse_special(path)
    if path.is_symlink():
        raise InputError(f"{path} is a link; give the name of the folder itself to {argument('output')}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} already exists; remove it or give another {argument('output')}")
    _check_parent(path)
    remove_dead(path.parent, [path.name])


def check_report_folder(path: Path) -> None:
    """Refuse an output folder for files that may replace others where it cannot be one.

    What a dead process left of writing it is removed.

    Raises:
        InputError: saying why.
    """
    _refuse_special(path)
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise InputError(f"{path} is no folder; give the name of a folder to {argument('output')}")
    _check_parent(path)
    remove_dead(path.parent, [path.name])


def check_free_file(path: Path) -> None:
    """Refuse an output file that cannot be written, before long work starts.

    What a dead process left of writing the same file is removed.

    Raises:
        InputError: its folder is missing, or it is a folder, device, pipe or socket.
    """
    check_file(path)
    remove_dead(path.parent, [path.name])


def check_replaceable(path: Path, kind: str, is_kind: Callable[[Path], bool]) -> None:
    """As `check_free_file`, and refuse a file that is there and holds something else: `-o` replaces its own kind alone.

    An empty file holds nothing and is replaced, as is a link that leads nowhere.

    Args:
        path: the output file.
        kind: what is to be written, as messages call it.
        is_kind: says of a file whether it is of that kind.

    Raises:
        InputError: as `check_free_file`, or the file is of another kind.
    """
    check_free_file(path)
    if path.is_file() and path.stat().st_size and not is_kind(path):
        raise InputError(f"{path} already exists and is no {kind}; remove it or give another {argument('output')}")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made: {error.strerror or error}") from error


def prepare_file(path: str | os.PathLike[str], kind: str, is_kind: Callable[[Path], bool]) -> Path:
    """The place of an output file whose folder is made where it is missing, as `check_replaceable` allows it.

    Raises:
        InputError: as `check_replaceable`, or the folder cannot be made.
    """
    place = Path(path)
    try:
        place.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{place} cannot be written: {error.strerror or error}") from error
    check_replaceable(place, kind, is_kind)
    return place


def check_file(path: Path, with_parent: bool = True) -> None:
    """Refuse an output file that cannot be written.

    Args:
        path: the file.
        with_parent: its folder must be there already.

    Raises:
        InputError: as `check_free_file`.
    """
    _refuse_special(path)
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder; give the name of a file")
    if with_parent:
        _check_parent(path)


def _check_parent(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: the folder {path.parent} does not exist")


def _refuse_special(path: Path) -> None:
    """Refuse what a rename would destroy and is not the product's: a device, a pipe, a socket, also behind a link.

    Raises:
        InputError: saying what it is.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    kind = KINDS.get(stat.S_IFMT(mode))
    if kind is None and path.is_symlink():
        # /dev/stdout may lead to a plain file, and is the system's own all the same.
        parent = path.absolute().parent.resolve()
        kind = "the system's own" if parent == DEVICES or PROCESSES in (parent, *parent.parents) else None
    if kind is not None:
        raise InputError(f"{path} is no plain file but {kind}; give another {argument('output')}")
