"""Every change of a file goes live, whatever its time says and whatever lies beside it, told or found by comparing."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import watchfiles

from qrlora_deploy.formats.coefficients import write_coefficients
from qrlora_deploy.runtime.customers.polling import FolderPoller
from tests.runtime.place import Place, until

YESTERDAY_NS = 1_700_000_000 * 10**9


@pytest.fixture(params=[False, True], ids=["told", "compared"])
def served(request: pytest.FixtureRequest, place: Place) -> Iterator[Place]:
    """Version 2 of acme is served and its folder is followed; version 1 lies beside the folder."""
    write_coefficients(place.version(1), place.folder.with_name("archive"))
    place.put("acme", 3)
    with place.store(poll=request.param):
        place.logits("acme")
        place.put("acme", 2)
        place.wait("loaded", 2)
        yield place


def copy_with_its_time(place: Place) -> None:
    """As `cp -p` of an archived file does."""
    shutil.copy2(archived(place, YESTERDAY_NS), place.path("acme"))


def rename_older(place: Place) -> None:
    archived(place, 0).replace(place.path("acme"))


def rename_with_the_same_time(place: Place) -> None:
    archived(place, place.path("acme").stat().st_mtime_ns).replace(place.path("acme"))


def write_with_the_same_time(place: Place) -> None:
    path = place.path("acme")
    time_ns = path.stat().st_mtime_ns
    shutil.copyfile(archived(place, 0), path)
    os.utime(path, ns=(time_ns, time_ns))


def point_elsewhere(place: Place) -> None:
    (place.folder / "..old").mkdir()
    archived(place, YESTERDAY_NS).rename(place.folder / "..old" / "acme")
    link = place.folder / "link"
    link.symlink_to("..old/acme")
    link.replace(place.path("acme"))


def archived(place: Place, time_ns: int) -> Path:
    path = place.folder.with_name("archive")
    os.utime(path, ns=(time_ns, time_ns))
    return path


@pytest.mark.parametrize(
    "change",
    [copy_with_its_time, rename_older, rename_with_the_same_time, write_with_the_same_time, point_elsewhere],
)
def test_a_rollback_goes_live(served: Place, change: Callable[[Place], None]) -> None:
    change(served)
    until(lambda: served.logits("acme") == served.expected(1), served.events)
    assert served.events[-1].digest == served.version(1).digest


def test_an_entry_that_leads_nowhere_hinders_nobody(served: Place) -> None:
    served.put("bolt", 1)
    served.put("cash", 1)
    for name in ("bolt", "cash"):
        served.logits(name)
    before = served.logits("bolt")
    served.path("bolt").unlink()
    served.path("bolt").symlink_to(served.path("bolt").name)
    (served.folder / "here").symlink_to(".")
    (served.folder / "up").symlink_to("..")
    served.path("nowhere").symlink_to("nothing")
    os.mkfifo(served.path("pipe"))
    served.put("acme", 4)
    until(lambda: served.logits("acme") == served.expected(4), served.events)
    served.path("cash").unlink()
    assert served.wait("removed").customer == "cash"
    refused = served.wait("refused")
    assert refused.customer == "bolt" and "cannot be read" in refused.message and served.logits("bolt") == before
    served.path("bolt").unlink()
    served.put("bolt", 2)
    until(lambda: served.logits("bolt") == served.expected(2), served.events)
    assert served.kinds().count("refused") == 1 and "failed" not in served.kinds()


def test_a_volume_of_links_goes_live(place: Place) -> None:
    """As Kubernetes mounts a ConfigMap: everything is a link to `..data`, which is one itself."""
    for number in (1, 2):
        (place.folder / f"..2026_{number}").mkdir()
        write_coefficients(place.version(number), place.folder / f"..2026_{number}" / "acme.safetensors")
    (place.folder / "..data").symlink_to("..2026_1")
    place.path("acme").symlink_to("..data/acme.safetensors")
    with place.store(poll=True):
        assert place.logits("acme") == place.expected(1)
        (place.folder / "..tmp").symlink_to("..2026_2")
        (place.folder / "..tmp").replace(place.folder / "..data")
        shutil.rmtree(place.folder / "..2026_1")
        until(lambda: place.logits("acme") == place.expected(2), place.events)


def test_a_file_of_whole_seconds_is_read_once_more(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system does not tell two changes apart, the content does."""
    place.put("acme", 1)
    monkeypatch.setattr("qrlora_deploy.runtime.customers.store.SETTLE_S", 0.5)
    monkeypatch.setattr(
        "qrlora_deploy.runtime.customers.polling.signature_of", lambda status: None if status is None else 1
    )
    monkeypatch.setattr(
        "qrlora_deploy.runtime.customers.store.signature_of", lambda status: None if status is None else 1
    )
    with place.store(poll=True):
        place.logits("acme")
        place.put("acme", 2)
        until(lambda: place.logits("acme") == place.expected(2), place.events)


def test_where_the_system_tells_nothing_files_are_compared(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: object, **options: object) -> object:
        raise OSError("OS file watch limit reached")

    monkeypatch.setattr(watchfiles, "watch", refuses)
    place.put("acme", 1)
    with place.store():
        place.logits("acme")
        assert "limit reached; its files are compared instead" in place.wait("failed").message
        place.put("acme", 2)
        until(lambda: place.logits("acme") == place.expected(2), place.events)
    assert place.kinds().count("failed") == 1


@pytest.mark.parametrize(("value", "polls"), [(None, False), ("", False), ("true", True), ("False", False)])
def test_the_variable_of_watchfiles_is_heeded(
    place: Place, monkeypatch: pytest.MonkeyPatch, value: str | None, polls: bool
) -> None:
    monkeypatch.setattr("platform.uname", lambda: os.uname())
    if value is None:
        monkeypatch.delenv("WATCHFILES_FORCE_POLLING", raising=False)
    else:
        monkeypatch.setenv("WATCHFILES_FORCE_POLLING", value)
    assert place.store()._watcher.polls == (polls or "microsoft-standard" in os.uname().release)


def test_a_comparison_names_what_is_new_gone_or_other(tmp_path: Path) -> None:
    for name in ("same", "other", "gone"):
        (tmp_path / name).write_text("1")
    (tmp_path / "circle").symlink_to("circle")
    poller = FolderPoller(tmp_path)
    assert poller.changed() == set()
    (tmp_path / "other").write_text("2")
    (tmp_path / "gone").unlink()
    (tmp_path / "new").symlink_to("nothing")
    assert poller.changed() == {"other", "gone", "new"}
    (tmp_path / "circle").unlink()
    (tmp_path / "nothing").write_text("")
    assert poller.changed() == {"circle", "new", "nothing"}
    assert poller.changed() == set()


def test_a_comparison_finds_what_was_replaced_before_it_looks_at_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qrlora_deploy.runtime.customers.polling.STEP", 10)
    for number in range(30):
        (tmp_path / f"{number:02}").write_text("1")
    poller = FolderPoller(tmp_path)

    def replace(name: str) -> None:
        """Keep its time, as `cp -p` does; the folder's own time tells of it, whatever its file system's clock."""
        status = (tmp_path / name).stat()
        new = tmp_path.with_name("new")
        new.write_text("2")
        os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
        new.replace(tmp_path / name)
        later = tmp_path.stat().st_mtime_ns + 10**9
        os.utime(tmp_path, ns=(later, later))

    replace("29")
    (tmp_path / "28").write_text("in place")
    steps = poller.steps()
    assert next(steps) == {"29"}
    replace("27")
    (tmp_path / "26").unlink()
    assert next(steps) == {"27", "26"}
    assert set().union(*steps) == {"28"}
    assert poller.changed() == set()
