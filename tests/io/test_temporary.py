"""Temporary folders: a live one is left alone, a dead one is removed, and nothing else is touched."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qrlora_deploy.io import temporary
from qrlora_deploy.io.temporary import (
    FOREIGN_SECONDS,
    LOCK,
    lock_folder,
    remove_dead,
    remove_if_dead,
    remove_live,
    remove_tree,
    scratch_folder,
    temporary_folder,
)
from tests.cli.running import environment

pytestmark = pytest.mark.skipif(not temporary.HAS_LOCKS, reason="nothing is locked here")


def left(parent: Path, name: str = "out", number: str = "0123abcd") -> Path:
    """What a process leaves that dies while it makes `name`: files, and a lock that nobody holds."""
    folder = parent / f".{name}.{number}.part"
    (folder / name).mkdir(parents=True)
    (folder / name / "part").write_text("half", encoding="utf-8")
    descriptor = lock_folder(folder)
    assert descriptor is not None
    os.close(descriptor)
    return folder


def test_what_is_being_made_stays_and_what_was_left_goes(tmp_path: Path) -> None:
    with temporary_folder(tmp_path, "out") as alive:
        dead = left(tmp_path)
        remove_dead(tmp_path, ["out"])
        assert alive.is_dir() and not dead.exists()
        assert lock_folder(alive) is None, "another process cannot have it"
    assert list(tmp_path.iterdir()) == []


def test_only_names_of_the_same_output_are_touched(tmp_path: Path) -> None:
    others = [left(tmp_path, "other"), left(tmp_path, "out.x"), tmp_path / ".out.part", tmp_path / ".out.0123.part"]
    for folder in others[2:]:
        folder.mkdir()
        (folder / LOCK).touch()
    (tmp_path / ".out.00000000.part").write_text("a file", encoding="utf-8")
    elsewhere = left(tmp_path / "elsewhere")
    (tmp_path / ".out.11111111.part").symlink_to(elsewhere)
    before = sorted(tmp_path.rglob("*"))
    remove_dead(tmp_path, ["out"])
    assert sorted(tmp_path.rglob("*")) == before


def age(folder: Path) -> None:
    then = time.time() - FOREIGN_SECONDS - 60
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then))


@pytest.mark.parametrize("of_whom", ["another machine", "one whose lock went first"])
def test_what_cannot_be_told_dead_goes_when_it_was_still_for_a_day(tmp_path: Path, of_whom: str) -> None:
    folder = left(tmp_path)
    if of_whom == "another machine":
        (folder / LOCK).write_text("elsewhere\n1234", encoding="utf-8")
    else:
        (folder / LOCK).unlink()
    assert not remove_if_dead(folder) and folder.is_dir()
    age(folder)
    (folder / "out" / "part").touch()  # something is still being written
    assert not remove_if_dead(folder)
    age(folder)
    assert remove_if_dead(folder) and not folder.exists()


@pytest.mark.parametrize("step", ["made", "its lock is empty"])
def test_what_died_before_it_held_anything_goes_at_once(tmp_path: Path, step: str) -> None:
    folder = tmp_path / ".out.0123abcd.part"
    folder.mkdir()
    if step != "made":
        (folder / LOCK).touch()
    remove_dead(tmp_path, ["out"])
    assert not folder.exists()


def test_a_live_process_whose_empty_folder_was_swept_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, swept = temporary.lock_folder, []

    def sweep(folder: Path) -> int | None:
        if not swept:
            remove_dead(tmp_path, ["out"])
            swept.append(folder)
        return lock(folder)

    monkeypatch.setattr(temporary, "lock_folder", sweep)
    with temporary_folder(tmp_path, "out") as folder:
        assert folder.is_dir() and folder != swept[0] and not swept[0].exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_removed_before_it_was_locked_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None, None])
    monkeypatch.setattr(temporary, "lock_folder", lambda folder: next(answers, 99_999))
    monkeypatch.setattr(temporary.os, "close", lambda descriptor: None)
    with temporary_folder(tmp_path, "out") as folder:
        assert len(list(tmp_path.iterdir())) == 3 and folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_removing_is_finished_when_a_signal_asks_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls, remove = left(tmp_path), [], temporary._remove

    def interrupted(path: Path) -> None:
        calls.append(path)
        if len(calls) < 3:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(temporary, "_remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_tree(folder)
    assert len(calls) == 3 and not folder.exists()


def test_a_lock_stays_as_long_as_something_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may write a file again that was just removed; the next run must know the folder for dead."""
    folder, remove = left(tmp_path), temporary.shutil.rmtree

    def written_again(path: Path, ignore_errors: bool) -> None:
        remove(path, ignore_errors=ignore_errors)
        if path == folder / "out":
            (folder / "more").touch()

    monkeypatch.setattr(temporary.shutil, "rmtree", written_again)
    remove_tree(folder)
    assert sorted(path.name for path in folder.iterdir()) == [LOCK, "more"]
    temporary._live.add(folder)
    remove_live()
    assert not folder.exists() and folder not in temporary._live


ENDED = """
import sys
from pathlib import Path
from qrlora_deploy.io import temporary

def cut_short(folder):
    temporary.remove_tree = original
    raise KeyboardInterrupt

original, temporary.remove_tree = temporary.remove_tree, cut_short
with temporary.temporary_folder(Path(sys.argv[1]), "out") as folder:
    (folder / "part").write_text("half")
"""


def test_what_cleaning_up_left_goes_when_the_process_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDED, str(tmp_path)], env=environment(), timeout=50, check=False, capture_output=True
    )
    assert b"KeyboardInterrupt" in done.stderr and list(tmp_path.iterdir()) == []


def test_names_as_long_as_a_file_system_takes(tmp_path: Path) -> None:
    name = "x" * 250
    with temporary_folder(tmp_path, name) as folder:
        (folder / name).touch()
        dead = left(tmp_path, temporary._label(name))
        remove_dead(tmp_path, [name])
        assert not dead.exists() and folder.exists()


def test_scratch_is_for_its_user_alone_and_cleaned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary.tempfile, "gettempdir", lambda: str(tmp_path))
    dead, other = left(tmp_path, temporary.SCRATCH), left(tmp_path, "out")
    with scratch_folder() as folder:
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        assert not dead.exists() and other.exists()
    assert list(tmp_path.iterdir()) == [other]
