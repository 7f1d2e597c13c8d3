"""Which outputs a run has: the base's own, or a new set of labels with a new output layer."""

from dataclasses import dataclass
from typing import Any

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.labels import quoted
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.options import AUTO
from qrlora_deploy.tasks.registry import BY_OPTION, guess_task, task_named


@dataclass(frozen=True)
class Outputs:
    """What the model answers.

    Attributes:
        task: of the head.
        labels: names of the outputs, in their order.
        new: whether the output layer starts afresh instead of with the base's weights.
        bias: where the bias of a new output layer starts, as `Task.new_head` says.
        remark: what a user may not expect: why it is a regression, or that a trained head is replaced; else empty.
    """

    task: Task
    labels: tuple[str, ...]
    new: bool
    bias: float = 0.0
    remark: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for a model with these outputs."""
        if not self.new:
            return self.task.config_fields
        return {
            **self.task.config_fields,
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "ignore_mismatched_sizes": True,
        }


def taken_for(checkpoint: Checkpoint, wanted: str) -> Checkpoint:
    """A base whose head is taken for the task that `--task` names, where its config leaves that open."""
    return checkpoint if wanted == AUTO else checkpoint.taken_for(BY_OPTION[wanted].name)


def base_outputs(checkpoint: Checkpoint) -> Outputs:
    """The outputs of the base as it is.

    Raises:
        InputError: it has no head, or one that this project does not train.
    """
    checkpoint.require_task_head()
    return Outputs(task_named(checkpoint.task), checkpoint.labels, new=False)


def frozen_outputs(checkpoint: Checkpoint, wanted: str) -> Outputs:
    """The outputs of the base as it is, where its head stays.

    Args:
        checkpoint: the base.
        wanted: "auto", or the task that the head must have.

    Raises:
        InputError: as `base_outputs`, or the head has another task.
    """
    base = base_outputs(checkpoint)
    if wanted not in (AUTO, base.task.option):
        raise InputError(
            f"{argument('task', wanted)}: the head of {checkpoint.name} is for {base.task.name}; "
            f"give the base another one by `warmup`, or train one by {argument('head', 'output')}"
        )
    return base


def own_outputs(checkpoint: Checkpoint, examples: Examples, wanted: str = "auto") -> Outputs:
    """The base's outputs where they serve for the labels of `examples`, else a new set.

    Args:
        checkpoint: the base.
        examples: the training data.
        wanted: "auto", or the option of a task.

    Raises:
        InputError: the labels are all the same, or it is not clear what they are.
    """
    replaced = ""
    if checkpoint.has_task_head:
        base = base_outputs(checkpoint)
        if wanted in (AUTO, base.task.option):
            try:
                base.task.check_rows(examples)
                base.task.encode(examples, base.labels)
                return base
            except InputError:
                pass  # other labels than the base's: a new set
        replaced = f"a new head replaces the base's for {quoted(base.labels, 4)}"
    guess = guess_task(examples, wanted)
    remark = "; ".join(filter(None, (replaced, f"a {guess.task.option}: {guess.reason}" if guess.reason else "")))
    guess.task.check_rows(examples)
    head = guess.task.new_head(examples)
    return Outputs(guess.task, head.labels, new=True, bias=head.bias, remark=remark)


def customer_outputs(checkpoint: Checkpoint, examples: Examples, head: str, wanted: str = AUTO) -> Outputs:
    """The outputs of a customer, whose base stays as it is.

    Args:
        checkpoint: the base.
        examples: the training data.
        head: "frozen" or "output", as in `TrainSettings`.
        wanted: "auto", or what `--task` calls a task.

    Raises:
        InputError: as `frozen_outputs` or `own_outputs`, or the base is a model of another kind than the labels need.
    """
    if head == "frozen":
        return frozen_outputs(checkpoint, wanted)
    outputs = own_outputs(checkpoint, examples, wanted)
    base = base_outputs(checkpoint).task
    if outputs.task.model_class != base.model_class:
        raise InputError(
            f"{examples.name} is data of {outputs.task.name}, but {checkpoint.name} is a {checkpoint.architecture}, "
            f"for {base.name}; make a base for {outputs.task.name} by `warmup`"
        )
    return outputs


def encode_rows(
    outputs: Outputs, train: Examples, evaluation: Examples | None, frozen: bool = False
) -> tuple[list[Any], list[Any]]:
    """The targets of both, as `Task.encode`; empty where there are no held-out examples.

    Args:
        outputs: what the model answers.
        train: the training examples.
        evaluation: the held-out ones, or None.
        frozen: whether the base's head stays, whatever the labels.

    Raises:
        InputError: a label is none of the outputs; the line names its row and what can be done.
    """
    for examples in filter(None, (train, evaluation)):
        outputs.task.check_rows(examples)
    try:
        targets = outputs.task.encode(train, outputs.labels)
    except InputError as error:
        way = (
            f"leave such rows out, or train a head for the labels of {argument('data')} by {argument('head', 'output')}"
        )
        raise InputError(f"{error}; {way}" if frozen and outputs.task.names_outputs else str(error)) from error
    try:
        return targets, outputs.task.encode(evaluation, outputs.labels) if evaluation else []
    except InputError as error:
        more = f", or give {argument('data')} examples of it" if outputs.task.names_outputs and not frozen else ""
        raise InputError(f"{error}; leave such rows out of {argument('evaluation')}{more}") from error
