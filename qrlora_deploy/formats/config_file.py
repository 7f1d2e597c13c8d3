"""What a checkpoint's `config.json` says, read as JSON: no transformers, no code, no conversions."""

from pathlib import Path

from pydantic import BaseModel, Field

from qrlora_deploy.errors import FileFormatError
from qrlora_deploy.io.reading import parse_json, read_text
from qrlora_deploy.io.strict import from_value
from qrlora_deploy.tasks.registry import has_task_head, writes_text

MAX_BYTES = 16 * 2**20

DEFAULT_OUTPUTS = 2
"""Outputs of a config that names none: transformers leaves its own defaults out of the file."""

THRESHOLDS_KEY = "qrlora_thresholds"
"""Where a merged checkpoint keeps its customer's thresholds; transformers leaves the entry as it is."""


class ModelConfig(BaseModel):
    """The fields that this project looks at; a model has many others.

    Attributes:
        architectures: class names; the first one is the checkpoint's.
        id2label: names of the outputs by their number.
        num_labels: number of outputs, where they have no names.
        qrlora_task: the task, where transformers has no `problem_type` for it.
        qrlora_thresholds: for each output of a multi-label head the probability from which on it applies.
    """

    model_type: str | None = None
    problem_type: str | None = None
    architectures: list[str] | None = None
    id2label: dict[str, str | int] | None = None
    qrlora_task: str | None = None
    num_labels: int | None = Field(default=None, ge=0, le=2**31)
    vocab_size: int | None = None
    type_vocab_size: int | None = None
    hidden_size: int | None = None
    qrlora_thresholds: list[float] | None = None
    num_hidden_layers: int | None = None

    @property
    def architecture(self) -> str:
        """Class name of the model; empty where the file names none."""
        return (self.architectures or [""])[0]

    @property
    def has_task_head(self) -> bool:
        """Whether the checkpoint can classify or regress as it is."""
        return has_task_head(self.architecture)

    @property
    def writes_text(self) -> bool:
        """Whether the checkpoint is a decoder that writes text."""
        return writes_text(self.architecture)


def read_model_config(path: Path) -> ModelConfig:
    """Read a `config.json`.

    Raises:
        InputError: it cannot be read.
        FileFormatError: it is no JSON object, or a field has another type.
    """
    value = parse_json(read_text(path, MAX_BYTES), f"{path} is not JSON")
    return from_value(ModelConfig, value, f"{path} cannot be used")


def label_names(config: ModelConfig, path: Path) -> list[str]:
    """Names of the outputs that the `config.json` at `path` gives, in order.

    Raises:
        FileFormatError: they are not numbered from 0.
    """
    if config.id2label is None:
        count = DEFAULT_OUTPUTS if config.num_labels is None else config.num_labels
        return [f"LABEL_{index}" for index in range(min(count, 2**16))]
    missing = [index for index in range(len(config.id2label)) if str(index) not in config.id2label]
    if missing:
        raise FileFormatError(f"{path}: id2label must count from 0 on, and has no {missing[0]}")
    return [str(config.id2label[str(index)]) for index in range(len(config.id2label))]
