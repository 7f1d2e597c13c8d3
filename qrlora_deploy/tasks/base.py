"""What a task is: what rows are trained towards, what a model answers, and how answers are judged."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from qrlora_deploy.data.labels import Label
from qrlora_deploy.tasks.names import label_index, output_of

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples


@dataclass(frozen=True)
class Answer:
    """What a model answers to one text.

    Attributes:
        label: the name of the most likely output; of a regression the name of its only one.
        score: its probability; of a regression the value itself.
        labels: the names of all outputs that apply: one of a classification, any number of a multi-label task.
    """

    label: str
    score: float
    labels: tuple[str, ...]


@dataclass(frozen=True)
class NewHead:
    """Outputs that are made for training data.

    Attributes:
        labels: their names, in the order of the logits.
        bias: where the bias of the output layer starts.
    """

    labels: tuple[str, ...]
    bias: float = 0.0


class Task(ABC):
    """A kind of question that a model answers about a text; its implementations hold no state.

    An implementation needs no PyTorch to be imported, since a serving host has none: `loss` alone uses it.

    Attributes:
        name: what files call it, such as "text-classification".
        option: what `--task` calls it, such as "classification".
        problem_type: what `config.json` calls it.
        metrics: names of what `score` gives; the first one chooses the best checkpoint.
        signal: the metric that is exactly 0 where answers say nothing of the labels.
        trains_in_fleets: whether many customers can be trained together.
        has_accuracy: whether an answer is right or wrong.
    """

    name: ClassVar[str]
    option: ClassVar[str]
    problem_type: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    signal: ClassVar[str]
    trains_in_fleets: ClassVar[bool] = True
    has_accuracy: ClassVar[bool] = True

    @abstractmethod
    def recognise(self, examples: "Examples") -> str | None:
        """Why labels that nobody named the task of are taken for this one's; None where they are not.

        Empty where nobody would expect anything else.

        Raises:
            InputError: they are nearly this task's, and it is not clear what they are; row and label are named.
        """

    @abstractmethod
    def new_head(self, examples: "Examples") -> NewHead:
        """The outputs of a head that is made for these examples.

        Raises:
            InputError: the labels are not this task's, or there is nothing to tell apart.
        """

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def names_in(self, label: Label) -> tuple[str, ...]:
        """The names of outputs that a row's label consists of."""
        return (label,) if isinstance(label, str) else label

    def named(self, examples: "Examples") -> list[str]:
        """All names of outputs in the labels of `examples`, as often as they occur, in the order of the rows."""
        return [name for label in examples.labels for name in self.names_in(label)]

    def unknown(self, examples: "Examples", names: Sequence[str]) -> list[str]:
        """The labels in `examples` that no output called `names` is meant by, sorted."""
        index = label_index(names)
        return sorted({name for name in self.named(examples) if output_of(index, name) is None})

    @abstractmethod
    def encode(self, examples: "Examples", names: Sequence[str]) -> list[Any]:
        """The targets of training, one a row, for outputs called `names`.

        Raises:
            InputError: labels that the outputs cannot mean; all of them are counted, the first ones named.
        """

    @abstractmethod
    def loss(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean loss of a batch, as transformers' own forward computes it.

        Args:
            logits: `[n, labels]`.
            targets: `[n]` or `[n, labels]`, from `encode`.

        Returns:
            A scalar, fp32.
        """

    @abstractmethod
    def score(self, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """The `metrics`, all of them finite where the logits are.

        Args:
            logits: `[n, labels]`.
            targets: `[n]` or `[n, labels]`, from `encode`.
        """

    @abstractmethod
    def answer(self, logits: np.ndarray, names: Sequence[str]) -> Answer:
        """What logits `[labels]` say of a text, by the names of the outputs."""

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """What logits `[labels]` say of each output, fp64 `[labels]`: here of each by itself, as `answer` has it."""
        return np.array([self.answer(logits[index : index + 1], ("",)).score for index in range(len(logits))])

    @abstractmethod
    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """`[n]` fp64, from 0 to 1: the share of equal decisions in each row of two `[n, labels]`.

        Labels that a customer does not have are -inf in both.
        """

    def right(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """`[n]` bool: whether a row's answer is wholly right.

        Raises:
            NotImplementedError: the task has no accuracy.
        """
        raise NotImplementedError(f"{self.name} has no accuracy")

    def says_nothing(self, metrics: Mapping[str, float]) -> bool:
        """Whether metrics, which may be empty, show answers that are alike for every text."""
        return metrics.get(self.signal) == 0.0
