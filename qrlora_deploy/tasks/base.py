"""What a task is: what rows are trained towards, what a model answers, and how answers are judged."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from qrlora_deploy.data.labels import Label
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.answers import Answer, NewHead, Span
from qrlora_deploy.tasks.names import AUTO_MODEL, IGNORED, TASK_FIELD, label_index, output_of
from qrlora_deploy.tasks.row_kinds import lacks_of_rows
from qrlora_deploy.tokenization.words import LocatedWords

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples

__all__ = ["AUTO_MODEL", "IGNORED", "TASK_FIELD", "Answer", "NewHead", "Span", "Task"]


class Task(ABC):
    """A kind of question that a model answers about a text; its implementations hold nothing but how they decide.

    An implementation needs no PyTorch to be imported, since a serving host has none: `loss` alone uses it.

    Attributes:
        name: what files call it, such as "text-classification".
        option: what `--task` calls it, such as "classification".
        problem_type: what `config.json` calls it; None: transformers has no name for it, and the model's class says it,
            or the field `TASK_FIELD`.
        model_class: transformers' class of its models.
        output_shape: axes of the answer; the last one are the outputs.
        output_name: of the graph's output.
        pipeline: what the Hub calls its models.
        peft_type: what PEFT calls it.
        has_labels: whether outputs have names, which an output layer and the labels of data give; else a model has no
            head, and data no labels.
        names_outputs: whether labels of data name outputs, so that a new head may know others.
        needs_pairs: whether a question is a pair of texts.
        pairs_apart: whether the texts of a pair are read each by itself, and pairs are for training alone.
        least_size: an error of an answer is measured by the largest number in the answers, or by this if that is less.
        metrics: names of what `score` gives; the first one chooses the best checkpoint.
        signal: the metric that is exactly 0 where answers say nothing of the labels.
        trains_in_fleets: whether many customers can be trained together.
        has_accuracy: whether an answer is right or wrong.
        is_number: whether a row's label is a number.
        judges_labels: whether a row's target has a value for every label; else it is one value.
        least_batch: rows of a step, and rows of data, below which a loss says nothing.
        writes_text: whether a model answers with text, by a head of its own over its tokens.
        lower_is_better: those of the metrics that are best where they are least.
        rate_factor: what the default learning rate of coefficients is multiplied by.
    """

    name: ClassVar[str]
    option: ClassVar[str]
    problem_type: ClassVar[str | None]
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    output_shape: ClassVar[tuple[str, ...]] = ("batch", "labels")
    output_name: ClassVar[str] = "logits"
    pipeline: ClassVar[str] = "text-classification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    has_labels: ClassVar[bool] = True
    names_outputs: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False
    pairs_apart: ClassVar[bool] = False
    least_size: ClassVar[float] = 1.0
    metrics: ClassVar[tuple[str, ...]]
    signal: ClassVar[str]
    trains_in_fleets: ClassVar[bool] = True
    has_accuracy: ClassVar[bool] = True
    is_number: ClassVar[bool] = False
    judges_labels: ClassVar[bool] = False
    least_batch: ClassVar[int] = 1
    writes_text: ClassVar[bool] = False
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    rate_factor: ClassVar[float] = 1.0

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

    @property
    def answers_words(self) -> bool:
        """Whether a model answers every token of a text, and not the text as a whole."""
        return "sequence" in self.output_shape

    @property
    def architecture_end(self) -> str:
        """The end of the names of its models' classes, such as "ForSequenceClassification"."""
        return self.model_class.removeprefix(AUTO_MODEL)

    def axes(self, outputs: int) -> tuple[str | int, ...]:
        """`output_shape` of a graph with so many outputs."""
        return (*self.output_shape[:-1], outputs)

    def check_rows(self, examples: "Examples") -> None:
        """Make sure that rows are of the task's kind: labels of texts, or tags of words.

        Raises:
            InputError: they are of the other kind.
        """
        wrong = lacks_of_rows(self.name, self.writes_text, self.answers_words, examples)
        if wrong:
            raise InputError(f"{examples.name}: {wrong}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @property
    def config_fields(self) -> dict[str, str | None]:
        """What `config.json` says of the task; None: nothing. `TASK_FIELD` beside a `problem_type` is not looked at."""
        fields: dict[str, str | None] = {"problem_type": self.problem_type}
        return fields if self.problem_type is not None else fields | {TASK_FIELD: self.name}

    def fits_head(self, problem_type: str | None, outputs: int) -> bool:
        """Whether a head may be this task's where `TASK_FIELD` or the user says so."""
        return False

    def deciding_at(self, thresholds: Sequence[float]) -> Self:
        """The task as a customer with thresholds of its own has it; itself where there are none to decide by.

        Args:
            thresholds: for each label the probability from which on it applies; empty: 0.5 for all of them. Tasks
                that do not `judges_labels` pass them over.
        """
        return self

    def best_thresholds(self, logits: np.ndarray, targets: np.ndarray) -> tuple[float, ...]:
        """The thresholds that are best for F1 on held-out rows; empty where the task has none.

        Args:
            logits: `[n, labels]`.
            targets: `[n, labels]`, from `encode`.
        """
        return ()

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
        """The targets of training, one a row, for outputs called `names`; `place_target` makes a row's ready.

        Raises:
            InputError: labels that the outputs cannot mean; all of them are counted, the first ones named.
        """

    def place_target(self, target: Any, words: LocatedWords, tokens: int) -> Any:
        """The target of a row by its `tokens`, where words have targets.

        Raises:
            NotImplementedError: the task is about whole texts.
        """
        raise NotImplementedError(f"{self.name} is about whole texts")

    def forward(self, model: Any, batch: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
        """What a model answers to a batch of its own inputs, with a gradient: logits `[n, labels]`, or embeddings."""
        answers: torch.Tensor = model(**batch).logits
        return answers

    def graded(self, model: Any, batch: Mapping[str, "torch.Tensor"], targets: "torch.Tensor") -> "torch.Tensor":
        """What `loss` and `score` take of a model, with a gradient: here `forward`, whatever the targets are."""
        return self.forward(model, batch)

    def by_row(self, answers: "torch.Tensor") -> "torch.Tensor":
        """What `forward` gave for a batch of data, with all answers to a row of data in one row."""
        return answers

    @abstractmethod
    def loss(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean loss of a batch, as transformers' own forward computes it.

        Args:
            logits: `[n, labels]`, or `[n, tokens, labels]`.
            targets: `[n]` or `[n, labels]`, from `encode`; or `[n, tokens]`, from `place_target`.

        Returns:
            A scalar, fp32.
        """

    def row_losses(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The loss of each row, whose mean over the rows of one customer is `loss`; rows may be of many customers.

        Args:
            logits: `[n, labels]`; -inf for labels that a row's customer does not have.
            targets: `[n]`, or `[n, labels]` where the task `judges_labels`, of any float or integer type.

        Returns:
            `[n]` fp32.

        Raises:
            NotImplementedError: the task does not train in fleets.
        """
        raise NotImplementedError(f"{self.name} does not train in fleets")

    @abstractmethod
    def score(self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
        """The `metrics`, all of them finite where the logits are.

        Args:
            logits: as in `loss`.
            targets: as in `loss`.
            names: of the outputs; the words of a text need them, to know which tags belong together.
        """

    def decisive(self, logits: "torch.Tensor") -> "torch.Tensor":
        """`[n, width]` of logits `[n, labels]`: what `score_each` needs of them; -inf as in `row_losses`."""
        return logits

    def score_each(
        self, owners: np.ndarray, decisive: np.ndarray, targets: np.ndarray, customers: int
    ) -> list[dict[str, float]]:
        """The `metrics` of many customers, as `score` gives them for one.

        Args:
            owners: `[n]`, whose row each is, from 0 to `customers` - 1.
            decisive: `[n, width]`, of the rows' logits.
            targets: `[n]`, or `[n, labels]` where the task `judges_labels`.
            customers: how many there are; each has one row at least.
        """
        rows = [owners == customer for customer in range(customers)]
        return [self.score(decisive[own], targets[own]) for own in rows]

    @abstractmethod
    def answer(self, logits: np.ndarray, names: Sequence[str], words: LocatedWords | None = None) -> Answer:
        """What the logits of a row say of a text.

        Args:
            logits: `[labels]`, or `[tokens, labels]`.
            names: of the outputs.
            words: of the text, where each has an answer.
        """

    def matches(self, found: Sequence[str], expected: Sequence[str], names: Sequence[str]) -> bool:
        """Whether the `labels` of an `Answer` are those of a row, in the spelling of either.

        Args:
            found: of an answer.
            expected: of a row of data.
            names: of the outputs, in their order.
        """
        index = label_index(names)
        return {output_of(index, name) for name in found} == {output_of(index, name) for name in expected}

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """What logits `[labels]` say of each output, fp64 `[labels]`: here of each by itself, as `answer` has it."""
        return np.array([self.answer(logits[index : index + 1], ("",)).score for index in range(len(logits))])

    @abstractmethod
    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """`[n]` fp64, from 0 to 1: the share of equal decisions in each row of two `[n, labels]` or
        `[n, tokens, labels]`.

        Labels that a customer does not have, and tokens that are padding, are -inf in both.
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
