"""Training a fleet: what is checked and planned before its loop, and reported after it."""

import time

import torch

from qrlora_deploy.errors import InputError, QrloraError, argument
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.training.fleet.customers import FleetSource, choose_customers
from qrlora_deploy.training.fleet.loop import Fleet, Progress
from qrlora_deploy.training.fleet.options import FleetOptions, FleetReport
from qrlora_deploy.training.fleet.summary import (
    summary_file,
    write_summary,
)
from qrlora_deploy.training.settings import TrainSettings, choose_device


def train_fleet(
    checkpoint: Checkpoint,
    basis: Basis,
    source: FleetSource,
    settings: TrainSettings,
    options: FleetOptions,
    progress: Progress | None = None,
) -> FleetReport:
    """Train every customer of a shard, each as `trainer.train` would alone with the same seed.

    A customer's file is written as soon as it is done. What is wrong with one customer ends in its line
    of the summary and stops no other. The base and the basis are not changed.

    Args:
        checkpoint: the base, with its task head.
        basis: made from this base.
        source: the rows of all customers.
        settings: how each customer is trained.
        options: how the fleet runs.
        progress: called with (done, failed, total) when customers are done.

    Raises:
        InputError: the data as a whole, the settings or the output do not fit; nothing was trained.
        BasisMismatchError: the basis was made from other weights.
        ProviderError: CUDA was asked for where there is none.
        QrloraError: the disk or the memory is full. Customers that were done keep their files.
    """
    if settings.dropout:
        raise InputError("a fleet trains without dropout: its masks would depend on who else is in the batch")
    if settings.tune_thresholds and source.evaluation is None:
        raise InputError(f"{argument('tune_thresholds')} chooses them on held-out rows; give {argument('evaluation')}")
    device = _device(settings, options.local_rank)
    check_basis_fits(checkpoint, basis)
    start = time.perf_counter()
    chosen = choose_customers(source, checkpoint, settings, options.shard, basis)
    options.open_output(chosen.customers)
    fleet = Fleet(checkpoint, basis, settings, options, chosen, device)
    summary = summary_file(options.output, options.shard)
    try:
        fleet.run(progress)
    except torch.OutOfMemoryError as error:
        raise QrloraError(
            f"out of GPU memory; try a smaller {argument('rows_per_step')} or {argument('max_length')}"
        ) from error
    finally:
        write_summary(fleet.lines.values(), summary)
    return FleetReport(list(fleet.lines.values()), chosen.strangers, time.perf_counter() - start, summary)


def _device(settings: TrainSettings, local_rank: int) -> torch.device:
    if choose_device(settings.device) == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(f"worker {local_rank} of this machine has no GPU of its own: there are {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
