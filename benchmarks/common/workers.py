"""Worker processes that share the GPUs there are."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from typing import TypeVar

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"

Job = TypeVar("Job")


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
