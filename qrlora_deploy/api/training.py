"""From labelled text to a base with a head, to a customer, and to a fleet of customers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

from qrlora_deploy.api.inputs import Progress, StrPath, as_basis, as_coefficients
from qrlora_deploy.api.options import FleetTrainOptions, TrainOptions, WarmupOptions
from qrlora_deploy.api.sources import as_checkpoint, as_examples
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients, recorded_place
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.io.temporary import scratch_folder
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.training.fleet.customers import FleetSource, Shard
from qrlora_deploy.training.fleet.options import FleetOptions, FleetReport
from qrlora_deploy.training.fleet.run import train_fleet as train_all
from qrlora_deploy.training.settings import RunSettings, TrainSettings, WarmupSettings, choose_device
from qrlora_deploy.training.trainer import train as train_one
from qrlora_deploy.training.warmup import warmup as warm_up


def warmup(
    base: StrPath | Checkpoint,
    data: StrPath | Examples,
    output: StrPath,
    *,
    evaluation: StrPath | Examples | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    progress: Progress | None = None,
    **settings: Unpack[WarmupOptions],
) -> dict[str, Any]:
    """Fine-tune a base on labelled text before it is factorized: gives an encoder its task head.

    Args:
        base: folder or hub name.
        data: examples of every label that customers will use: a TSV, CSV, JSONL or Parquet file, a hub data set,
            or `Examples`.
        output: the new checkpoint's folder (safetensors, fp32), which must not hold anything yet.
        evaluation: held-out examples for the report.
        text_column: column of the text, or two with a comma between them; common names are found.
        label_column: column of the label; "label" is found.
        progress: called with (description, done, total) after each step.
        settings: keywords of `WarmupSettings`, such as `epochs=3` or `mode="head"`.

    Returns:
        The report, which the folder holds as `warmup.json`: task, labels, steps, metrics and more, plain JSON values.

    Raises:
        InputError: the data, the base, a setting or the output do not fit; nothing is written.
        ProviderError: CUDA was asked for where there is none.
        QrloraError: the loss diverged, or the disk or the memory is full; nothing is left behind.

    Examples:
        >>> report = qr.warmup("base", "all.tsv", "warm", evaluation="dev.tsv", epochs=1)
        >>> report["task"], report["steps"]
        ('text-classification', 1)
    """
    place = Path(output)
    check_free_folder(place)
    chosen = WarmupSettings(**settings)
    choose_device(chosen.device)
    rows, held_out = _read(data, evaluation, text_column, label_column, chosen)
    return warm_up(as_checkpoint(base), rows, held_out, place, chosen, progress)


def train(
    base: StrPath | Checkpoint,
    basis: StrPath | Basis,
    data: StrPath | Examples,
    *,
    evaluation: StrPath | Examples | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    work_dir: StrPath | None = None,
    resume: bool = False,
    start: StrPath | Coefficients | None = None,
    progress: Progress | None = None,
    **settings: Unpack[TrainOptions],
) -> Coefficients:
    """Train one customer on labelled text: `W + Q diag(c) R`, of which `c` alone is trained.

    With evaluation data the best epoch by the metric is kept and the run stops early; without, the last epoch is kept.

    Args:
        base: folder or hub name, with its task head.
        basis: made from this base: a file or a `Basis`.
        data: the customer's examples: a TSV, CSV, JSONL or Parquet file, a hub data set, or `Examples`.
        evaluation: held-out examples.
        text_column: column of the text, or two with a comma between them; common names are found.
        label_column: column of the label; "label" is found.
        work_dir: folder of the run's checkpoints, which stays for the caller to remove, and which `resume` goes on
            from. None: a temporary one, which is removed when the run ends.
        resume: go on from the last whole checkpoint in `work_dir`.
        start: a customer to go on from, such as one that `project` made: a file or `Coefficients`; None: the base.
        progress: called with (description, done, total) after each step.
        settings: keywords of `TrainSettings`, such as `epochs=5`, `learning_rate=0.05` or `head="output"`.

    Returns:
        The customer: values `[total_rank]` fp32 and its training record, in memory; `save` writes it.

    Raises:
        InputError: the data, a setting or `work_dir` do not fit; nothing was trained.
        BasisMismatchError: the basis was made from other weights.
        ProviderError: CUDA was asked for where there is none.
        QrloraError: the loss diverged, or the disk or the memory is full.

    Examples:
        >>> acme = qr.train("base", "basis.safetensors", "acme.tsv", evaluation="dev.tsv", epochs=2)
        >>> acme.save("customers/umbrella.safetensors")
        >>> acme.values.dtype, acme.training["rows"]
        (dtype('float32'), 24)
    """
    chosen = TrainSettings(**settings)
    choose_device(chosen.device)
    rows, held_out = _read(data, evaluation, text_column, label_column, chosen)
    frozen = as_basis(basis)
    with _work_folder(work_dir, resume) as folder:
        place, begin = str(frozen.file or ""), None if start is None else as_coefficients(start)
        return train_one(as_checkpoint(base), frozen, rows, held_out, chosen, folder, resume, place, progress, begin)


def train_fleet(
    base: StrPath | Checkpoint,
    basis: StrPath | Basis,
    data: StrPath,
    output: StrPath,
    *,
    evaluation: StrPath | None = None,
    customer_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    resume: bool = False,
    rows_per_step: int | None = None,
    shard: tuple[int, int] = (0, 1),
    local_rank: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
    **settings: Unpack[FleetTrainOptions],
) -> FleetReport:
    """Train many customers in one process, each as `train` would alone with the same seed.

    A customer's file is written as soon as it is done. What is wrong with one customer ends in its line of the
    report and stops no other.

    Args:
        base: folder or hub name, with its task head.
        basis: made from this base: a file or a `Basis`.
        data: a file with a column of customers' ids, or a folder of one file a customer, named by its id.
        output: folder of the customers' files and of `summary.jsonl`; made if it is missing.
        evaluation: the same for held-out rows.
        customer_column: column of the ids; None for a folder with a file a customer.
        text_column: column of the text, or two with a comma between them; common names are found.
        label_column: column of the label; "label" is found.
        resume: pass over customers whose file is there from the same data and settings.
        rows_per_step: rows of all customers in a step; by the device where it is None.
        shard: train the i-th of n parts, `(i, n)` with i from 0.
        local_rank: which of several GPUs.
        progress: called with (done, failed, total) when customers are done.
        settings: keywords of `TrainSettings` but `dropout`, `trunk_cache`, `packing` and `base_dtype`, such as
            `epochs=5`.

    Returns:
        One line a customer, and how long it took.

    Raises:
        InputError: the data as a whole, a setting or the output do not fit; nothing was trained.
        BasisMismatchError: the basis was made from other weights.
        ProviderError: CUDA was asked for where there is none.
        QrloraError: the disk or the memory is full. Customers that were done keep their files.

    Examples:
        >>> report = qr.train_fleet("base", "basis.safetensors", "all.tsv", "fleet", customer_column="id", epochs=1)
        >>> report.count("trained")
        2
    """
    chosen = TrainSettings(**settings)
    choose_device(chosen.device)
    folder, frozen = Path(output), as_basis(basis)
    held_out = None if evaluation is None else Path(evaluation)
    source = FleetSource(Path(data), held_out, customer_column, text_column, label_column)
    place = recorded_place(frozen.file, folder / "customer") if frozen.file else ""
    options = FleetOptions(folder, resume, rows_per_step, Shard(*shard), local_rank, place)
    return train_all(as_checkpoint(base), frozen, source, chosen, options, progress)


def _read(
    data: StrPath | Examples,
    evaluation: StrPath | Examples | None,
    text_column: str | None,
    label_column: str | None,
    settings: RunSettings,
) -> tuple[Examples, Examples | None]:
    columns = (text_column, label_column, settings.labelled, settings.written)
    rows = as_examples(data, *columns)
    return rows, None if evaluation is None else as_examples(evaluation, *columns)


@contextmanager
def _work_folder(given: StrPath | None, resume: bool) -> Iterator[Path]:
    if given is not None:
        yield Path(given)
        return
    if resume:
        raise InputError("resume: give the work_dir of the run to go on with")
    with scratch_folder() as folder:
        yield folder
