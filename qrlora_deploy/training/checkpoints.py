"""The folder of a run: its settings and its checkpoints, of which a resumed run believes only what is whole.

After everything else of a checkpoint is on the disk, the digests of its files are written into it.
A power loss leaves files that are empty or full of zeros, and a checkpoint that was cut has no digests.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.io.files import digest_file, flush_file, flush_folder, write_json, writing
from qrlora_deploy.io.outputs import make_folder
from qrlora_deploy.io.temporary import lock_folder, remove_dead, remove_if_dead, remove_tree, unlocked

SETTINGS = "settings.json"
DIGESTS = "digests.json"
STATE = "trainer_state.json"
FORMAT = "qrlora-checkpoint"


class Sealing(TrainerCallback):
    """Seals each checkpoint, and removes older ones when that is on the disk, but for the best."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Everything of a checkpoint has been written."""
        work_dir = Path(args.output_dir)
        newest = work_dir / f"checkpoint-{state.global_step}"
        seal(newest)
        kept = {newest.name, Path(state.best_model_checkpoint or newest).name}
        for folder in checkpoints(work_dir):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def checkpoints(work_dir: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the newest first."""
    found = [path for path in work_dir.iterdir() if re.fullmatch(r"checkpoint-\d{1,18}", path.name)]
    return sorted(found, key=lambda path: -int(path.name.split("-")[1]))


def seal(folder: Path) -> None:
    """Flush a checkpoint to the disk and then write the digests of its files.

    Raises:
        OSError: the disk refuses it.
    """
    names = _names(folder)
    for name in names:
        flush_file(folder / name)
    flush_folder(folder)
    write_json(folder / DIGESTS, {"format": FORMAT, "files": {name: digest_file(folder / name) for name in names}})
    flush_folder(folder)
    flush_folder(folder.parent)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != DIGESTS)


def damage_of(folder: Path) -> str:
    """Why a checkpoint is not whole, with the checkpoint that it names as the best; empty where it is."""
    wrong = _damage(folder)
    if wrong:
        return wrong
    best = json.loads((folder / STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
    if best is None or Path(best).name == folder.name:
        return ""
    # By its name: the folder may have moved since an interrupted run wrote its whole path.
    name = Path(best).name
    wrong = _damage(folder.parent / name)
    return f"of its best epoch, {name}, {wrong}" if wrong else ""


def _damage(folder: Path) -> str:
    try:
        record = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        digests = record["files"]
        if record["format"] != FORMAT or not isinstance(digests, dict):
            return f"{DIGESTS} is damaged"
        names = _names(folder)
        if differing := sorted(digests.keys() ^ set(names)):
            return f"{differing[0]} is missing or does not belong there"
        wrong = next((name for name in names if digest_file(folder / name) != digests[name]), None)
        return f"{wrong} was changed after it was written" if wrong else ""
    except FileNotFoundError:
        return f"it has no {DIGESTS}: it was cut, or an earlier version wrote it"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{DIGESTS} is damaged"


def last_whole(work_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, None where none is, and a line for each newer one, which is not."""
    passed: list[str] = []
    for folder in checkpoints(work_dir):
        damage = damage_of(folder)
        if not damage:
            return folder, passed
        passed.append(f"{folder} is passed over: {damage}")
    return None, passed


def open_work_dir(work_dir: Path, marks: dict[str, Any], resume: bool) -> Path | None:
    """Make the folder of a run, or find the last whole checkpoint of the run to resume.

    Checkpoints that are not whole are removed then.

    Args:
        work_dir: folder of the run.
        marks: what an interrupted run and this one must have in common.
        resume: go on in a folder that holds a run.

    Raises:
        InputError: the folder cannot be made, or holds another run, or one that is not to be resumed.
    """
    settings_file = work_dir / SETTINGS
    if work_dir.exists() and not work_dir.is_dir():
        raise InputError(f"{work_dir} is a file; the run needs a folder")
    if settings_file.is_file() and not resume:
        raise InputError(f"{work_dir} holds an earlier run; continue it by {argument('resume', True)} or remove it")
    if settings_file.is_file():
        _check_same(settings_file, marks)
        return _clean(work_dir)
    make_folder(work_dir)
    if checkpoints(work_dir):
        raise InputError(f"{work_dir} holds checkpoints of another program; give another folder")
    write_json(settings_file, marks)
    return None


def _clean(work_dir: Path) -> Path | None:
    remove_dead(work_dir, [SETTINGS])
    last, _ = last_whole(work_dir)
    # The trainer would write the same steps into what is left of them.
    for folder in checkpoints(work_dir):
        if folder == last:
            break
        shutil.rmtree(folder, ignore_errors=True)
    return last


def _check_same(settings_file: Path, marks: dict[str, Any]) -> None:
    try:
        before = json.loads(settings_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{settings_file} is damaged; remove {settings_file.parent} and start again without {argument('resume')}"
        ) from error
    names = sorted(marks.keys() | before.keys()) if isinstance(before, dict) else ["everything"]
    changed = [name for name in names if not isinstance(before, dict) or before.get(name) != marks.get(name)]
    if changed:
        raise InputError(
            f"{settings_file.parent} holds a run with other settings ({', '.join(changed)}); "
            "resume with the same ones, or remove the folder"
        )


@contextmanager
def run_folder(output: Path, resume: bool, worth: Callable[[Path], object] = checkpoints) -> Iterator[Path]:
    """Yield the folder of a run's own checkpoints, hidden beside `output` and locked meanwhile.

    It is removed when the run is done, and kept, where it holds a checkpoint, when the run was
    interrupted, failed or could not be written: `--resume` goes on from there. What a dead
    process left without a checkpoint is removed; no checkpoint is, but for those of the run that is done.

    Args:
        output: what the run makes.
        resume: go on with what was left.
        worth: says of the folder whether it holds a checkpoint, or what a run keeps otherwise.

    Raises:
        InputError: `resume` is asked for and no run was left; or it is not, and one was; or another
            process is making the same output.
    """
    folder = folder_of_run(output)
    if resume and not folder.is_dir():
        raise InputError(
            f"{argument('resume', True)}: no interrupted run of {output} is found ({folder} does not exist)"
        )
    if not resume:
        _make_new(folder, output, worth)
    descriptor = _lock(folder)
    if descriptor is None:
        raise InputError(f"another process is making {output}: it holds {folder}")
    keep = resume
    try:
        yield folder
        keep = False
    except BaseException:
        keep = resume or bool(worth(folder))
        raise
    finally:
        with unlocked(descriptor):
            if not keep:
                remove_tree(folder)


def folder_of_run(output: Path) -> Path:
    """Where a run of `output` keeps what it goes on with."""
    return output.with_name(f".{output.name}.work")


def _lock(folder: Path) -> int | None:
    with writing(folder):
        try:
            return lock_folder(folder)
        except FileNotFoundError:  # another process had it for an empty one
            return None


def _make_new(folder: Path, output: Path, worth: Callable[[Path], object]) -> None:
    try:
        if folder.is_dir() and not worth(folder) and not remove_if_dead(folder):
            with suppress(OSError):
                folder.rmdir()  # of a process that died between two steps
        folder.mkdir()
    except FileExistsError:
        raise InputError(
            f"{folder} holds a run of {output} that was interrupted or is under way; "
            f"continue it by {argument('resume', True)}, or remove {folder} to start again"
        ) from None
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror or error}") from error
