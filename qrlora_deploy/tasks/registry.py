"""The tasks there are, by each of their names. A new task is a module of its own, a line here and one in `options`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.causal_lm import CausalLM
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.embedding import Embedding
from qrlora_deploy.tasks.multi_label import MultiLabel
from qrlora_deploy.tasks.options import AUTO
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.tasks.reranking import Reranking
from qrlora_deploy.tasks.token_classification import TokenClassification

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples

TASKS: tuple[Task, ...] = (
    CausalLM(),
    TokenClassification(),
    MultiLabel(),
    Reranking(),
    Embedding(),
    Regression(),
    Classification(),
)
"""In the order in which they are asked whether labels are theirs; the last one takes what is left."""

WRITERS = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of models that write text."""

BY_NAME = {task.name: task for task in TASKS}
BY_OPTION = {task.option: task for task in TASKS}
BY_PROBLEM_TYPE = {task.problem_type: task for task in TASKS if task.problem_type is not None}


@dataclass(frozen=True)
class Guess:
    """What labels are taken for.

    Attributes:
        task: theirs.
        reason: why, where nobody said so and somebody may expect another one; else empty.
    """

    task: Task
    reason: str = ""


def task_named(name: str) -> Task:
    """The task that files call `name`.

    Raises:
        InputError: there is none.
    """
    if name not in BY_NAME:
        raise InputError(f"unknown task {name!r}; this version knows {', '.join(sorted(BY_NAME))}")
    return BY_NAME[name]


def has_task_head(architecture: str) -> bool:
    """Whether models of this class answer a task by a head of its own."""
    return bool(_tasks_of(architecture))


def writes_text(architecture: str) -> bool:
    """Whether models of this class are decoders that write text, as GPT2LMHeadModel and LlamaForCausalLM."""
    return architecture.endswith(WRITERS)


def _tasks_of(architecture: str) -> list[Task]:
    return [task for task in TASKS if task.has_labels and architecture.endswith(task.architecture_end)]


def task_of_config(problem_type: str | None, outputs: int, architecture: str = "", named: str | None = None) -> Task:
    """The task of a head, by the class of its model where that has one task alone, else by `problem_type` of its
    `config.json`; by the number of outputs where it names none.

    transformers takes one output for a number, and several for classes.

    Args:
        problem_type: of `config.json`.
        outputs: of the head.
        architecture: name of the model's class.
        named: a task's name in `TASK_FIELD` of the config, or from the user; counts where the head may be that task's.
    """
    if writes_text(architecture):
        return BY_NAME[CausalLM.name]
    alone = _tasks_of(architecture)
    if len(alone) == 1:
        return alone[0]
    if named in BY_NAME and BY_NAME[named].fits_head(problem_type, outputs):
        return BY_NAME[named]
    if outputs == 1 and problem_type != MultiLabel.problem_type:
        return BY_NAME[Regression.name]
    return BY_PROBLEM_TYPE.get(problem_type or "", BY_NAME[Classification.name])


def guess_task(examples: "Examples", wanted: str = AUTO) -> Guess:
    """The task of labels: what was asked for, or else what they look like.

    Args:
        examples: the training data.
        wanted: "auto", or what `--task` calls a task.

    Raises:
        InputError: it is not clear what the labels are; the row and the label are named.
    """
    if wanted != AUTO:
        return Guess(BY_OPTION[wanted])
    for task in TASKS:
        reason = task.recognise(examples)
        if reason is not None:
            return Guess(task, reason)
    raise RuntimeError("no task takes labels of any kind")
