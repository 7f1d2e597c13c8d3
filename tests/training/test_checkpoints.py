"""Resuming after damage: what does not fit its digest is passed over, and the customer is the undisturbed run's."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.io.files import write_json
from qrlora_deploy.io.temporary import LOCK
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.training.checkpoints import DIGESTS, SETTINGS, STATE, checkpoints, last_whole, run_folder
from qrlora_deploy.training.trainer import train
from tests.training.test_trainer import EXAMPLES, FLIPPED, settings_of

NEWEST = "checkpoint-16"
PARTS = ("trainable.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE, DIGESTS)
RUN = settings_of(epochs=6, patience=6, learning_rate=0.05, seed=3)


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tiny_basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Coefficients:
    """What the run gives when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("whole")
    return train(open_checkpoint(str(tiny_base)), tiny_basis, EXAMPLES, FLIPPED, RUN, folder / "run")


@pytest.fixture(scope="module")
def cut(tiny_base: Path, tiny_basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted in its fifth epoch, its best epoch made the second."""
    folder = tmp_path_factory.mktemp("cut") / "run"

    def interrupt(description: str, done: int, total: int) -> None:
        if (description, done) == ("train", 17):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(open_checkpoint(str(tiny_base)), tiny_basis, EXAMPLES, FLIPPED, RUN, folder, progress=interrupt)
    return folder


@pytest.fixture
def run(cut: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(cut, tmp_path / "run"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": Path.unlink,
    "{}": lambda path: path.write_text("{}"),
    "deep": lambda path: path.write_text("[" * 100_000),
}


def test_the_newest_is_believed_where_nothing_happened(run: Path) -> None:
    names = [folder.name for folder in checkpoints(run)]
    assert names[0] == NEWEST and len(names) == 2, "the newest and the best"
    assert last_whole(run) == (run / NEWEST, [])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part_is_noticed(run: Path, part: str, damage: str) -> None:
    best = checkpoints(run)[1].name
    DAMAGES[damage](run / NEWEST / part)
    last, passed = last_whole(run)
    assert last == run / best and len(passed) == 1
    assert passed[0].startswith(f"{run / NEWEST} is passed over: ")
    # Another digest than that of the file is the file's fault, or the digest's.
    assert part in passed[0] or part == DIGESTS
    # The newest needs the best, whose parameters the run ends with.
    shutil.rmtree(run / NEWEST)
    DAMAGES[damage](run / best / part)
    assert last_whole(run)[0] is None


def test_the_best_epoch_belongs_to_what_is_believed(run: Path) -> None:
    best = checkpoints(run)[1]
    flip(best / "trainable.safetensors")
    last, passed = last_whole(run)
    assert last is None and len(passed) == 2
    assert f"of its best epoch, {best.name}, trainable.safetensors was changed after it was written" in passed[0]


def test_a_file_too_many_is_noticed(run: Path) -> None:
    (run / NEWEST / "scaler.pt").write_bytes(b"")
    assert "scaler.pt is missing or does not belong there" in last_whole(run)[1][0]


@pytest.mark.parametrize(
    ("damaged", "damage", "first"),
    [("newest", "a bit", "second"), ("newest", "empty", "second"), ("best", "a bit", "first"), ("none", "", "newest")],
)
def test_what_is_passed_over_is_trained_again_to_the_same_bits(
    tiny_base: Path, tiny_basis: Basis, whole: Coefficients, run: Path, damaged: str, damage: str, first: str
) -> None:
    newest, best = checkpoints(run)
    starts = {"first": 1, "second": int(best.name.split("-")[1]) + 1, "newest": 17}
    part = "trainable.safetensors" if damage == "a bit" else "optimizer.pt"
    if damage:
        DAMAGES[damage]({"newest": newest, "best": best}[damaged] / part)
    steps: list[int] = []

    def watch(description: str, done: int, total: int) -> None:
        steps.extend([done] if description == "train" else [])

    resumed = train(
        open_checkpoint(str(tiny_base)), tiny_basis, EXAMPLES, FLIPPED, RUN, run, resume=True, progress=watch
    )
    assert steps[0] == starts[first]
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert resumed.training == whole.training


def test_a_run_of_an_earlier_version_starts_again(run: Path) -> None:
    for folder in checkpoints(run):
        (folder / DIGESTS).unlink()
    last, passed = last_whole(run)
    assert last is None
    assert all(line.endswith("it was cut, or an earlier version wrote it") for line in passed) and len(passed) == 2


def start(output: Path, resume: bool = False) -> None:
    with run_folder(output, resume):
        pass


def test_an_interrupted_run_is_removed_by_nobody_but_its_user(tmp_path: Path, cut: Path) -> None:
    output, folder = tmp_path / "acme", tmp_path / ".acme.work"
    shutil.copytree(cut, folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError) as caught:
        start(output)
    assert str(caught.value) == (
        f"{folder} holds a run of {output} that was interrupted or is under way; continue it by resume=True, "
        f"or remove {folder} to start again"
    )
    for error in (InputError("other settings"), KeyboardInterrupt()):
        with pytest.raises(type(error)), run_folder(output, True):
            raise error
    assert sorted(path for path in folder.rglob("*") if path.name != LOCK) == before
    start(output, resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [InputError("the output is a folder now"), KeyboardInterrupt()])
def test_a_checkpoint_is_kept_whatever_ended_the_run(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), run_folder(tmp_path / "acme", False) as folder:
        (folder / "checkpoint-4").mkdir()
        raise error
    assert (folder / "checkpoint-4").is_dir()


def test_a_run_under_way_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "acme"
    with run_folder(output, False) as folder:
        write_json(folder / SETTINGS, {})
        for resume, message in ((False, "was interrupted or is under way"), (True, "another process is making")):
            with pytest.raises(InputError, match=message):
                start(output, resume)
        assert (folder / SETTINGS).is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_died_before_its_first_checkpoint_is_no_run(tmp_path: Path) -> None:
    folder = tmp_path / ".acme.work"
    with run_folder(tmp_path / "acme", False):
        write_json(folder / SETTINGS, {})
        shutil.copytree(folder, tmp_path / "kept")
    (tmp_path / "kept").rename(folder)
    start(tmp_path / "acme")
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    start(tmp_path / "acme")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no interrupted run of .*acme is found"):
        start(tmp_path / "acme", resume=True)


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_the_state_names_its_best_epoch_by_any_path(run: Path) -> None:
    state = json.loads((run / NEWEST / STATE).read_text())
    assert Path(state["best_model_checkpoint"]).name == checkpoints(run)[1].name
    assert Path(state["best_model_checkpoint"]).parent != run, "the folder was moved, and is whole all the same"
    assert last_whole(run)[0] == run / NEWEST
