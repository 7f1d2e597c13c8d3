"""What every quickstart needs: its folder, the time of its steps, its progress."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qrlora_deploy.io.files import atomic_folder
from qrlora_deploy.io.temporary import scratch_folder

Progress = Callable[[str, int, int], None]


class Clock:
    """Wall time of each step, whether it was done in one go or not.

    Args:
        seconds: of what was done before, to which more is added.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {} if seconds is None else seconds

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take the time of what is done within, also where it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)


@contextmanager
def kept_folder(out: Path | None) -> Iterator[Path]:
    """A folder to work in, which becomes `out` when all went well; a temporary one where there is none."""
    if out is None:
        with scratch_folder() as temporary:
            yield temporary
        return
    with atomic_folder(out) as folder:
        yield folder


def renamed(description: str, progress: Progress | None) -> Progress | None:
    """The same progress under another description."""
    if progress is None:
        return None
    return lambda _, done, total: progress(description, done, total)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
