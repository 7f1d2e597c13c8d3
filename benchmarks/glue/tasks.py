"""GLUE tasks: where the rows are, how they are scored, and their tokens ready for a GPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from sklearn.metrics import f1_score

from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.names import label_names
from qrlora_deploy.tasks.registry import task_named
from qrlora_deploy.tasks.regression import Regression

HUB = "hub"
"""Instead of a folder: read GLUE from the Hugging Face hub."""

HUB_SET = "nyu-mll/glue"
MULTIPLE = 8
"""Batches are padded to a multiple of this: tensor cores want it."""


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        name: as in the table, and of the folder with train.tsv and dev.tsv.
        hub: configuration of the hub's data set.
        metrics: what is reported, the headline first.
        train_rows: size of the training sample, or None for all rows.
        files: training and held-out rows below the folder; None: `name`/train.tsv and `name`/dev.tsv.
    """

    name: str
    hub: str
    metrics: tuple[str, ...]
    train_rows: int | None = None
    files: tuple[str, str] | None = None

    @property
    def kind(self) -> str:
        """The project's name of the kind of task."""
        return Regression.name if self.metrics[0] == "pearson" else Classification.name


TASKS = {
    task.name: task
    for task in (
        Task("RTE", "rte", ("accuracy",)),
        Task("MRPC", "mrpc", ("accuracy", "f1")),
        Task("CoLA", "cola", ("matthews",)),
        Task("STS-B", "stsb", ("pearson", "spearman")),
        Task("SST-2", "sst2", ("accuracy",), train_rows=8000),
    )
}
"""In the order in which they run: small ones first."""

TENANTS = {
    task.name: task
    for task in (
        Task("banking", "", ("accuracy",), files=("clinc150/banking/train.tsv", "clinc150/banking/test.tsv")),
        Task("travel", "", ("accuracy",), files=("clinc150/travel/train.tsv", "clinc150/travel/test.tsv")),
        Task("trec", "", ("accuracy",), files=("trec/train.tsv", "trec/test.tsv")),
        Task("snips", "", ("accuracy",), train_rows=4000, files=("snips/train.tsv", "snips/test.tsv")),
    )
}
"""Customers' tasks beside GLUE's, for settings that must not be chosen on GLUE's dev rows."""

ALL_TASKS = TASKS | TENANTS

PARTS = {"train": "train", "dev": "validation"}
"""Our name of a part, and the hub's."""

SAMPLE_SEED = 0
"""Of the rows drawn from a larger set: the same for every seed, method and model."""


@dataclass(frozen=True)
class Rows:
    """Tokenised rows on a device.

    Attributes:
        inputs: by input name, int64 `[n, longest]`, padded at the end; without the mask.
        lengths: tokens of each row, `[n]`, on the CPU, so that a batch's width needs no wait.
        device_lengths: the same on the device, from which the mask is made.
        targets: `[n]`, int64 classes or fp32 scores.
    """

    inputs: dict[str, torch.Tensor]
    lengths: np.ndarray
    device_lengths: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def first(self, share: float, seed: int) -> "Rows":
        """A share of the rows, drawn by `seed`, at least two batches of 32 where there are as many."""
        count = min(len(self), max(64, round(share * len(self))))
        return self.select(np.random.default_rng(seed).permutation(len(self))[:count])

    def select(self, chosen: np.ndarray) -> "Rows":
        """The rows of these numbers."""
        index = torch.from_numpy(chosen).to(self.targets.device)
        inputs = {name: array[index] for name, array in self.inputs.items()}
        return Rows(inputs, self.lengths[chosen], self.device_lengths[index], self.targets[index])

    def parted(self, share: float) -> tuple["Rows", "Rows"]:
        """Rows to train on, and a `share` of them that is held out, the same for every seed."""
        order = np.random.default_rng(SAMPLE_SEED).permutation(len(self))
        count = max(1, round(share * len(self)))
        return self.select(np.sort(order[count:])), self.select(np.sort(order[:count]))

    def batch(self, chosen: np.ndarray, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's inputs for the rows `chosen`, padded to the longest of them.

        Args:
            chosen: row numbers `[b]`.
            index: the same on the device.
        """
        longest = next(iter(self.inputs.values())).shape[1]
        width = min(longest, -(-int(self.lengths[chosen].max()) // MULTIPLE) * MULTIPLE)
        mask = torch.arange(width, device=index.device)[None] < self.device_lengths[index, None]
        inputs = {name: array[index, :width] for name, array in self.inputs.items()}
        return inputs | {"attention_mask": mask.to(torch.int64)}


def scores(task: Task, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The task's metrics; F1 is GLUE's, of the class 1, and not the mean over the classes."""
    found = task_named(task.kind).score(logits, targets)
    if "f1" in task.metrics:
        found["f1"] = float(f1_score(targets, logits.argmax(axis=-1), zero_division=0))
    return {name: round(found[name], 6) for name in task.metrics}


def read_part(task: Task, data: str, part: str, limit: int | None) -> Examples:
    """Rows of "train" or "dev", sampled where the task or `limit` says so.

    Raises:
        InputError: they are not in the folder, or the hub cannot be reached.
    """
    if data == HUB:
        examples = read_examples(f"{HUB_SET}:{task.hub}", split=PARTS[part])
    else:
        name = task.files[list(PARTS).index(part)] if task.files else f"{task.name}/{part}.tsv"
        examples = read_examples(Path(data) / name)
    most = min(value for value in (limit, task.train_rows if part == "train" else None, len(examples)) if value)
    if most == len(examples):
        return examples
    rows = np.sort(np.random.default_rng(SAMPLE_SEED).permutation(len(examples))[:most])
    pairs = None if examples.pairs is None else [examples.pairs[row] for row in rows]
    return Examples([examples.texts[row] for row in rows], pairs, [examples.labels[row] for row in rows], examples.name)


def write_tokens(
    task: Task, data: str, checkpoint: Checkpoint, path: Path, max_length: int, limit: int | None = None
) -> None:
    """Tokenise both parts of a task into one file, so that no worker does it again.

    Raises:
        InputError: as `read_part`.
    """
    parts = {part: read_part(task, data, part, limit) for part in PARTS}
    names = label_names(map(str, parts["train"].labels)) if task.kind == Classification.name else ("score",)
    write_rows(task, parts, names, checkpoint, path, max_length)


def write_rows(
    task: Task, parts: dict[str, Examples], names: tuple[str, ...], checkpoint: Checkpoint, path: Path, max_length: int
) -> None:
    """Tokenise the parts of a task, by the names of `PARTS`, into the file that `read_tokens` reads."""
    tokenizer = checkpoint.tokenizer()
    tensors: dict[str, np.ndarray] = {}
    for part, examples in parts.items():
        encoded = tokenizer(examples.texts, examples.pairs, truncation=True, max_length=max_length)
        lengths = np.array([len(row) for row in encoded["input_ids"]])
        for name in encoded:
            if name != "attention_mask":
                padding = tokenizer.pad_token_id if name == "input_ids" else 0
                tensors[f"{part}.inputs.{name}"] = _padded(encoded[name], lengths, padding)
        kind = np.int64 if task.kind == Classification.name else np.float32
        tensors[f"{part}.lengths"] = lengths
        tensors[f"{part}.targets"] = np.array(task_named(task.kind).encode(examples, names), dtype=kind)
    with atomic_file(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, {"labels": "\n".join(names)})


def _padded(rows: list[list[int]], lengths: np.ndarray, padding: int) -> np.ndarray:
    width = -(-int(lengths.max()) // MULTIPLE) * MULTIPLE
    whole = np.full((len(rows), width), padding, dtype=np.int64)
    for row, values in enumerate(rows):
        whole[row, : len(values)] = values
    return whole


def read_tokens(path: Path, device: str) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """The parts of a task by name, on `device`, and its labels.

    Raises:
        InputError: the file is not there.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; it is made from --data at the start of a run")
    with safetensors.safe_open(path, framework="np") as file:
        labels = tuple((file.metadata() or {})["labels"].split("\n"))
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parts = {}
    for part in PARTS:
        prefix = f"{part}.inputs."
        inputs = {n.removeprefix(prefix): torch.from_numpy(a).to(device) for n, a in tensors.items() if prefix in n}
        lengths = tensors[f"{part}.lengths"]
        targets = torch.from_numpy(tensors[f"{part}.targets"]).to(device)
        parts[part] = Rows(inputs, lengths, torch.from_numpy(lengths).to(device), targets)
    return parts, labels
