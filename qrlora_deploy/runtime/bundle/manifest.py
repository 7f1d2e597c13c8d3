"""The manifest of a bundle: what it is, and what every one of its files must hash to."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from qrlora_deploy.io.strict import Record
from qrlora_deploy.io.versions import Versions
from qrlora_deploy.runtime.bundle.manifest_parts import (
    CalibrationRecord,
    ParityRecord,
    Precision,
    TargetRecord,
    TensorRecord,
)
from qrlora_deploy.runtime.bundle.row_layout import (
    COEFFICIENTS,
    HEAD,
    HEAD_TABLE,
    TABLE,
    TABLE_DTYPES,
    HeadLayout,
    TableLayout,
    padded_rank,
)
from qrlora_deploy.tasks.answering import Answering
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.registry import BY_NAME, task_named
from qrlora_deploy.tasks.thresholds import check_thresholds

VERSIONS = Versions(1)

UNSEALED = {"format_version", "base_name", "files", "parity", "customer_effect", "attention_nodes", "versions"}
"""Fields of a manifest that decide no answer: where it comes from and how it was checked."""

NUMBERS = {
    TABLE: tuple(map(str, TABLE_DTYPES.values())),
    COEFFICIENTS: tuple(map(str, TABLE_DTYPES.values())),
    HEAD_TABLE: ("float32",),
    HEAD: ("float32",),
}
"""Inputs that hold customers' numbers, and the dtypes that they may have."""

Digest = Field(pattern=r"^[0-9a-f]{64}$")


def _known_task(name: str) -> str:
    if name not in BY_NAME:
        raise ValueError(f"unknown task; this version knows {', '.join(sorted(BY_NAME))}")
    return name


class Manifest(Record):
    """What a bundle is and what every one of its files must hash to.

    Attributes:
        kind: "merged": one customer, plain weights; "switchable": any customer in any row, from a table;
            "per-row": likewise, and each row brings its customer's numbers.
        thresholds: of a merged multi-label customer, for each label the probability from which on it applies; None:
            0.5 for all of them.
        precision: of weights and activations; the inputs and outputs are the same in every one.
        calibration: of int8 with constant scales; None: it has none, or an earlier version did not say.
        accuracy_level: of products with weights in blocks, as ONNX Runtime counts: 4: within them activations are
            rounded to 8 bits in the same blocks; 1: they are not. None: there are no such products, or an earlier
            version did not say.
        coefficients_digest: the customer of a merged bundle.
        total_rank: number of coefficients of a customer.
        head_labels: labels that a customer's own output layer may have; 0: all use the base's.
        head_features: inputs of the output layer, where customers may have their own; else 0.
        customer_effect: `max |logits(c) - logits(0)|` on the reference texts. Parity proves
            nothing about the customer where this is below the bound.
        attention_nodes: `Attention` operators in the graph; 0 where the model's own was exported.
        max_length: tokens the model can take.
        truncation_side: where a longer text loses tokens.
    """

    format_version: int = VERSIONS.current
    kind: Literal["merged", "switchable", "per-row"]
    task: Annotated[str, AfterValidator(_known_task)]
    labels: tuple[str, ...]
    thresholds: tuple[float, ...] | None = None
    precision: Precision
    calibration: CalibrationRecord | None = None
    accuracy_level: Literal[1, 4] | None = None
    opset: int
    basis_digest: str = Digest
    coefficients_digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    base_name: str
    base_digest: str = Digest
    total_rank: int = Field(gt=0)
    head_labels: int = Field(default=0, ge=0)
    head_features: int = Field(default=0, ge=0)
    targets: tuple[TargetRecord, ...] = Field(min_length=1)
    inputs: tuple[TensorRecord, ...] = Field(min_length=1)
    outputs: tuple[TensorRecord, ...] = Field(min_length=1)
    files: dict[str, str]
    parity: ParityRecord
    customer_effect: float = Field(ge=0)
    attention_nodes: int = Field(ge=0)
    max_length: int = Field(gt=0, lt=2**31)
    pad_token_id: int = Field(ge=0, lt=2**31)
    padding_side: Literal["right", "left"]
    pad_token_type_id: int = Field(ge=0, lt=2**31)
    truncation_side: Literal["right", "left"] = "right"
    versions: dict[str, str]

    @model_validator(mode="after")
    def _check_kind(self) -> "Manifest":
        merged = self.kind == "merged"
        if merged != (self.coefficients_digest is not None):
            raise ValueError(f"a {self.kind} bundle has {'a' if merged else 'no'} coefficients_digest")
        check_thresholds(self.thresholds or (), len(self.labels))
        if self.calibration is not None and self.precision != "int8":
            raise ValueError(f"calibration belongs to int8; {self.precision} has no scales to find")
        if self.accuracy_level is not None and self.precision not in ("int8", "int4"):
            raise ValueError(f"accuracy_level belongs to int8 and int4; {self.precision} has no weights in blocks")
        if bool(self.head_labels) != bool(self.head_features) or (merged and self.head_labels):
            raise ValueError("head_labels and head_features belong together, in a bundle of many customers")
        has_labels = BY_NAME[self.task].has_labels
        if has_labels != bool(self.labels) or (self.head_labels and not has_labels):
            raise ValueError(f"a {self.task} has {'labels' if has_labels else 'neither labels nor heads'}")
        if self.head_labels and self.head_labels < len(self.labels):
            raise ValueError(f"head_labels is {self.head_labels}, but the base has {len(self.labels)} labels")
        return self

    @model_validator(mode="after")
    def _check_shapes(self) -> "Manifest":
        """Before any table is made: the numbers that give its size belong together."""
        ranks = [target.rank for target in self.targets]
        if sum(ranks) != self.total_rank:
            raise ValueError(f"total_rank is {self.total_rank}, but the ranks add up to {sum(ranks)}")
        if any(target.padded_rank != padded_rank(target.rank) for target in self.targets):
            raise ValueError("a padded_rank is not that of its rank")
        if len({record.name for record in self.inputs}) < len(self.inputs):
            raise ValueError("two inputs have one name")
        shapes = {record.name: record.shape for record in self.inputs if record.name in NUMBERS}
        if shapes != self._shapes_of_numbers(ranks):
            raise ValueError(f"the inputs do not fit the ranks and the head of a {self.kind} bundle")
        for record in self.inputs:
            if record.name in NUMBERS and record.dtype not in NUMBERS[record.name]:
                raise ValueError("a table is of another dtype than float32, or float16 for the coefficients")
        columns = self.head_labels or len(self.labels) or self.width
        answer = (BY_NAME[self.task].output_name, BY_NAME[self.task].axes(columns))
        # A decoder gives its cache back behind the answer.
        count = 1 if BY_NAME[self.task].writes_text else len(self.outputs)
        if [(record.name, record.shape) for record in self.outputs[:count]] != [answer]:
            raise ValueError(f"the output is not {answer[0]} [{', '.join(map(str, answer[1]))}]")
        return self

    def _shapes_of_numbers(self, ranks: list[int]) -> dict[str, tuple[int | str, ...]]:
        """Axes of the inputs that hold customers' numbers."""
        if self.kind == "merged":
            return {}
        coefficients, head, axis = (TABLE, HEAD_TABLE, "slots")
        if self.kind == "per-row":
            coefficients, head, axis = COEFFICIENTS, HEAD, "batch"
        found: dict[str, tuple[int | str, ...]] = {coefficients: (axis, TableLayout(ranks).width)}
        if self.head_labels:
            found[head] = (axis, HeadLayout(self.head_labels, self.head_features).width)
        return found

    @property
    def width(self) -> int:
        """Numbers of an answer, as the graph gives them; 0 where the manifest does not say."""
        size = self.outputs[0].shape[-1] if self.outputs[0].shape else 0
        return size if isinstance(size, int) and size > 0 else 0

    @property
    def answering(self) -> Answering:
        """How the logits of the customer of a merged bundle, or of a base, become answers."""
        return Answering(self.labels, self.thresholds or ())

    @property
    def deciding_task(self) -> Task:
        """The task, which decides by the bundle's own thresholds."""
        return task_named(self.task).deciding_at(self.thresholds or ())

    @property
    def table_dtype(self) -> str:
        """Of customers' coefficients: "fp32" or "fp16"; of a merged bundle, which takes none, "fp32"."""
        found = next((record.dtype for record in self.inputs if record.name in (TABLE, COEFFICIENTS)), "float32")
        return next(name for name, dtype in TABLE_DTYPES.items() if dtype == found)

    def sealed_fields(self) -> dict[str, Any]:
        """What the reference repeats, so that no change of it goes unnoticed."""
        return self.model_dump(mode="json", exclude=UNSEALED)

    def changed_fields(self, sealed: dict[str, Any]) -> list[str]:
        """Fields that are not as in `sealed`; one that is not in there has its default."""
        known = type(self).model_fields
        fields = self.sealed_fields()
        return sorted(name for name, value in fields.items() if value != sealed.get(name, known[name].default))

    def to_json(self) -> str:
        """Indented JSON with sorted keys: the same manifest always has the same bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
