"""Every writer ended by signals: the output is whole or absent, and nothing that the product made is left."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qrlora_deploy.inspection.describe import describe
from tests.cli.running import ROOT, environment, run_here, succeed_here
from tests.training.fleet.making import random_rows, write_rows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")

TRAINING = "--basis basis.safetensors --max-length 16 --epochs 2 --device cpu"
ADAPTER = "export base --basis basis.safetensors --coefficients acme.safetensors"
WRITERS = {
    "factorize": "factorize base --rank 4 -o {}",
    "warmup": "warmup base --data rows.tsv --max-length 16 --epochs 1 --device cpu -o {}",
    "train": f"train base --data rows.tsv {TRAINING} -o {{}}",
    "train-fleet": f"train-fleet base --data fleet {TRAINING} -o {{}}",
    "merge": "merge base --basis basis.safetensors --coefficients acme.safetensors -o {}",
    "unmerge": "merge --unmerge merged base --basis basis.safetensors --coefficients acme.safetensors -o {}",
    "switchable": "export base --basis basis.safetensors -o {}",
    "merged": f"{ADAPTER} --merge -o {{}}",
    "peft": f"{ADAPTER} --format peft -o {{}}",
    "onnx-adapter": f"{ADAPTER} --format onnx-adapter -o {{}}",
    "pack": "pack customers --bundle bundle -o {}",
    "combine": "combine acme.safetensors:2 -o {}",
    "bench": "bench bundle --batch 1 --length 8 --seconds 0.2 --samples 6 --scenario single-stream -o {}",
    "plot": "inspect acme.safetensors --plot {}.png",
}
QUICK = ("factorize", "warmup", "train", "train-fleet", "merge", "peft", "pack", "combine", "plot", "bench")
"""Of these each kind of writing once."""

DESCRIBED = ("factorize", "warmup", "train", "merge", "unmerge", "switchable", "merged", "combine")
"""What `inspect` reads whole."""

FIRST_S = 0.15
"""By then a command that was forked from a warm process has its handlers."""

CODES = {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130, "SIGKILL": -signal.SIGKILL}


@pytest.fixture(scope="module")
def place(
    tiny_base: Path,
    tiny_basis_file: Path,
    tiny_customer_file: Path,
    switchable: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with all that the commands read."""
    folder = tmp_path_factory.mktemp("ending")
    shutil.copytree(tiny_base, folder / "base")
    shutil.copytree(switchable, folder / "bundle")
    shutil.copy(tiny_basis_file, folder / "basis.safetensors")
    shutil.copy(tiny_customer_file, folder / "acme.safetensors")
    (folder / "customers").mkdir()
    shutil.copy(tiny_customer_file, folder / "customers" / "acme.safetensors")
    write_rows(folder / "rows.tsv", random_rows(12, 0))
    (folder / "fleet").mkdir()
    for number in range(3):
        write_rows(folder / "fleet" / f"c{number}.tsv", random_rows(6, number))
    succeed_here(WRITERS["merge"].format("merged").split(), folder)
    return folder


Job = tuple[str, str | None, float | str]


def end(place: Path, jobs: list[Job]) -> list[dict[str, Any]]:
    """Do jobs (writer, signal, moment), each with the output `out/WRITER/it`; `out/tmp` is where scratch goes."""
    (place / "out" / "tmp").mkdir(parents=True, exist_ok=True)
    todo = []
    for writer, number, moment in jobs:
        (place / "out" / writer).mkdir(exist_ok=True)
        todo.append((WRITERS[writer].format(f"out/{writer}/it").split(), number, moment, f"out/{writer}"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.ending", str(place)],
        input=json.dumps(todo),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(TMPDIR=str(place / "out" / "tmp"), OMP_NUM_THREADS="1"),
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ended: list[dict[str, Any]] = json.loads(done.stdout)
    return ended


def is_temporary(name: str) -> bool:
    return name.endswith((".part", ".tmp", ".work")) or any(part.startswith(".") for part in Path(name).parts)


def test_every_writer_ended_in_the_middle_of_a_write(place: Path) -> None:
    jobs: list[Job] = []
    for number, writer in enumerate(QUICK):
        # Killed, and what the next run finds is removed by it, though it is ended in its turn.
        jobs += [(writer, "SIGKILL", "written"), (writer, ("SIGTERM", "SIGHUP", "SIGINT")[number % 3], "written")]
    for (writer, name, _), found in zip(jobs, end(place, jobs), strict=True):
        assert found["code"] == CODES[str(name)], (writer, name, found)
        left = [path for path in found["left"] if is_temporary(path)]
        assert bool(left) == (name == "SIGKILL"), (writer, name, found)
        if writer != "train-fleet":  # its folder stays, with those who are done
            assert [path for path in found["left"] if path not in left] == [], (writer, name, found)
    assert list((place / "out" / "tmp").glob(".*.part")) == []
    shutil.rmtree(place / "out")


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_refuses_a_pipe_before_its_work(place: Path, tmp_path: Path, writer: str) -> None:
    pipe = tmp_path / ("it.png" if writer == "plot" else "it")
    os.mkfifo(pipe)
    ran = run_here(*WRITERS[writer].format(tmp_path / "it").split(), cwd=place)
    option = "--plot" if writer == "plot" else "--output"
    assert ran.code == 2 and ran.err == f"Error: {pipe} is no plain file but a pipe; give another {option}\n"
    assert pipe.is_fifo()


@pytest.mark.slow
def test_every_writer_ended_at_random_moments(place: Path) -> None:
    chance = random.Random(0)
    whole = end(place, [(writer, None, 0.0) for writer in WRITERS])
    assert [found["code"] for found in whole] == [0] * len(WRITERS)
    shutil.rmtree(place / "out")
    # Within the time that each took: later there is nothing left to end.
    moments = {writer: (FIRST_S, max(FIRST_S, found["seconds"])) for writer, found in zip(WRITERS, whole, strict=True)}
    for names in (["SIGKILL"], ["SIGTERM", "SIGHUP", "SIGINT"]):
        jobs: list[Job] = [(writer, chance.choice(names), chance.uniform(*moments[writer])) for writer in WRITERS]
        for (writer, name, _), found in zip(jobs, end(place, jobs), strict=True):
            # Before the handlers are there, and after they are gone, a signal ends a process by itself.
            early = -int(getattr(signal, str(name)))
            assert found["code"] in (0, CODES[str(name)], early), (writer, name, found)
            kept = [path for path in found["left"] if is_temporary(path) and ".it.work" not in path]
            assert name == "SIGKILL" or kept == [], (writer, name, found)
        check_outputs(place)
        # Each begins afresh: one that another had interrupted would refuse to, or go on.
        shutil.rmtree(place / "out")


def check_outputs(place: Path) -> None:
    """Every output is whole or absent."""
    for writer in WRITERS:
        output = place / "out" / writer / ("it.png" if writer == "plot" else "it")
        if not output.exists():
            continue
        if writer in DESCRIBED:
            assert describe(output, None).kind, writer
        assert writer != "bench" or len(list(output.iterdir())) == 3
