"""Outputs: nothing but plain files and empty folders is ever replaced, and modes are those of the umask."""

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.io.files import atomic_file, atomic_files, atomic_folder
from qrlora_deploy.io.outputs import check_free_file, check_free_folder, check_report_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")

CHECKS: list[Callable[[Path], object]] = [
    check_free_file,
    check_free_folder,
    check_report_folder,
    lambda path: atomic_file(path).__enter__(),
    lambda path: atomic_files(path).__enter__(),
    lambda path: atomic_folder(path).__enter__(),
]


@pytest.fixture
def special(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a pipe, a socket, and links to both."""
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "socket"):
            Path(f"to-{name}").symlink_to(name)
        Path("to-link").symlink_to("to-pipe")
        yield tmp_path


@pytest.mark.parametrize("check", CHECKS)
def test_pipes_sockets_and_devices_are_refused(special: Path, check: Callable[[Path], object]) -> None:
    before = {path: path.lstat().st_ino for path in special.iterdir()}
    for name in (*before, Path("/dev/null"), Path("/dev/stdout"), Path("/proc/self/fd/1")):
        if name.exists():
            with pytest.raises(InputError, match=r"is no plain file but (a |the system's own)"):
                check(Path(name))
    assert {path: path.lstat().st_ino for path in special.iterdir()} == before


def test_the_systems_link_to_a_plain_file_is_refused(tmp_path: Path) -> None:
    """As /dev/stdout is where a shell sent the output to a file."""
    with (tmp_path / "file").open("w", encoding="utf-8") as file:
        link = Path(f"/proc/self/fd/{file.fileno()}")
        if not link.exists():
            pytest.skip("needs /proc")
        with pytest.raises(InputError, match="is no plain file but the system's own"):
            check_free_file(link)


@pytest.mark.parametrize("target", ["there", "missing"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path, target: str) -> None:
    (tmp_path / "there").write_text("old", encoding="utf-8")
    link = tmp_path / "link"
    link.symlink_to(target)
    check_free_file(link)
    with atomic_file(link) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert not link.is_symlink() and link.read_text() == "new"
    assert (tmp_path / "there").read_text() == "old" and not (tmp_path / "missing").exists()


@pytest.mark.parametrize("target", ["empty", "missing"])
def test_a_link_is_no_new_folder(tmp_path: Path, target: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(InputError, match="link is a link; give the name of the folder itself"):
        check_free_folder(tmp_path / "link")


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_everything_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir(0o700)
            for place in (folder, folder / "inner"):
                # A library that makes its files for their owner alone, whatever the umask says.
                safetensors.numpy.save_file({"a": np.ones(1)}, place / "weights")
                (place / "weights").chmod(0o600)
            (folder / "run").touch(0o777)
        with atomic_file(tmp_path / "file") as temporary:
            temporary.touch(0o600)
        with atomic_files(tmp_path / "report") as report:
            (report / "a").touch(0o600)
    finally:
        os.umask(before)
    folders, files = 0o777 & ~umask, 0o666 & ~umask
    assert modes(tmp_path) == {
        "folder": folders,
        "folder/inner": folders,
        "report": folders,
        **dict.fromkeys(["folder/weights", "folder/inner/weights", "folder/run", "file", "report/a"], files),
    }


def test_the_slower_of_two_writers_is_told_that_the_output_is_there(tmp_path: Path) -> None:
    ready, go, said = threading.Barrier(2), threading.Barrier(2), []

    def write(number: int) -> None:
        try:
            with atomic_folder(tmp_path / "out") as folder:
                (folder / "number").write_text(str(number), encoding="utf-8")
                ready.wait(10)
            said.append("")
        except QrloraError as error:
            said.append(f"{type(error).__name__}: {error}")
        go.wait(10)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place = tmp_path / "out"
    assert sorted(said) == ["", f"InputError: {place} already exists: another process made it meanwhile"]
    assert list(tmp_path.iterdir()) == [place] and (place / "number").read_text() in "01"


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    with pytest.raises(QrloraError, match="No space left"), atomic_files(folder) as place:
        (place / "a").write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with atomic_files(folder) as place:
            for name in "ab":
                (place / name).write_text(text, encoding="utf-8")
        (folder / "notes").write_text("the user's", encoding="utf-8")
        found = {path.name: path.read_text() for path in folder.iterdir()}
        assert found == {"a": text, "b": text, "notes": "the user's"}
    (folder / "b").unlink()
    (folder / "b").mkdir()
    with pytest.raises(InputError, match="b cannot be written: it is a folder"), atomic_files(folder) as place:
        for name in "ab":
            (place / name).write_text("three", encoding="utf-8")
    assert (folder / "a").read_text() == "two"
