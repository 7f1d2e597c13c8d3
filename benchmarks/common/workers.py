"""Worker processes that share the GPUs there are, and take one run after another until none is left."""

import argparse
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, TypeVar

import torch
import transformers

from qrlora_deploy.errors import QrloraError

VISIBLE = "CUDA_VISIBLE_DEVICES"


class OutOfTime(Exception):
    """The time is up; the run is not recorded and starts again in the next one."""


class Lent(Protocol):
    """What workers of every benchmark are told."""

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""

    @property
    def workers(self) -> int:
        """How many there are."""

    @property
    def deadline(self) -> float | None:
        """`time.time()` at which to stop, or None."""

    @property
    def parent(self) -> int:
        """Process that started the workers; without it they stop."""


Job = TypeVar("Job", bound=Lent)


def start_workers(work: Callable[[Job, int], None], job: Job, count: int, device: str) -> list[SpawnProcess]:
    """One process after another, each of which sees one GPU: a library that asks for "cuda" means its first.

    Args:
        work: called in each process with the job and the worker's number.
        job: what they share; it is pickled.
        count: how many processes.
        device: "cpu" or "cuda".
    """
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(job, index)) for index in range(count)]
    given = os.environ.get(VISIBLE)
    gpus = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    for index, worker in enumerate(workers):
        if device == "cuda":
            os.environ[VISIBLE] = gpus[index % len(gpus)]
        worker.start()
    if given is None:
        os.environ.pop(VISIBLE, None)
    else:
        os.environ[VISIBLE] = given
    return workers


def run_workers(work: Callable[[Job, int], None], job: Job, make: Callable[[], None]) -> None:
    """Start the workers, make what they wait for, and wait for them.

    Args:
        work: as for `start_workers`.
        job: of all workers.
        make: makes it.

    Raises:
        QrloraError: as of `make`; the workers are stopped.
    """
    workers = start_workers(work, job, job.workers, job.device)
    try:
        make()
    except QrloraError:
        for worker in workers:
            worker.terminate()
        raise
    for worker in workers:
        worker.join()


def take_all(job: Lent, index: int, take: Callable[[], bool | None], pause_s: float) -> None:
    """Take runs until none is left, the time is up, or the command has gone.

    Args:
        job: what the worker was told.
        index: its number.
        take: does a run; True where it did, False where others hold or prepare what is left, None where nothing is
            left. It may raise `OutOfTime`.
        pause_s: between two looks for work.
    """
    try:
        while os.getppid() == job.parent:
            done = take()
            if done is None:
                return
            if not done:
                if job.deadline is not None and time.time() > job.deadline:
                    return
                time.sleep(pause_s)
    except OutOfTime:
        print(f"[{index}] the time is up", file=sys.stderr, flush=True)


def prepare_process(job: Lent) -> None:
    """Share the processors among the workers, and leave out transformers' remarks on new heads, which are meant."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.workers))


def surroundings(job: Lent) -> dict[str, Any]:
    """Device, versions and number of workers, as kept with each run."""
    name = torch.cuda.get_device_name() if job.device == "cuda" else platform.machine()
    versions = {package: version(package) for package in ("torch", "transformers", "peft", "numpy")}
    return {"device": name, "versions": versions | {"python": platform.python_version()}, "workers": job.workers}


def named_model(text: str) -> tuple[str, str]:
    """Name and place of a model from NAME=FOLDER, for argparse."""
    name, found, folder = text.partition("=")
    if not found or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text} must be NAME=FOLDER, with a name of letters and digits")
    return name, folder
