"""What every step of an export reads, made once: the base's model and tokenizer, and the texts of the parity check."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from exporters.onnx.graph import input_names
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.models.capacity import check_ids, max_tokens
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.support import check_padding
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.registry import task_named

BATCH = 8
"""Rows of a case: enough for different lengths, few enough for a quick check."""


@dataclass(frozen=True)
class Texts:
    """The texts of the cases, single or in pairs."""

    texts: Sequence[str]
    pairs: Sequence[str] | None = None


@dataclass(frozen=True)
class Prepared:
    """A base whose model is loaded once, when it is first needed, and its tokenizer.

    Attributes:
        checkpoint: the base.
        tokenizer: of the base.
        texts: of the parity check.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    texts: Texts

    @cached_property
    def model(self) -> Any:
        """The base in fp32 on the CPU, in evaluation mode. It is the one that is merged, changed and exported.

        Raises:
            InputError: as `Checkpoint.load_model`.
        """
        return self.checkpoint.load_model()

    @cached_property
    def task(self) -> Task:
        """What the base is for; a customer with a head of its own may have another task on the same outputs."""
        return task_named(self.checkpoint.task)

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """The inputs that the tokenizer gives and the model takes, in a fixed order."""
        return input_names(self.checkpoint.skeleton(), self.tokenizer)

    @cached_property
    def max_tokens(self) -> int:
        """How many tokens of a text the model takes."""
        return max_tokens(self.checkpoint.skeleton(), self.tokenizer)


def prepare(checkpoint: Checkpoint, examples: Examples | None) -> Prepared:
    """The base with its tokenizer and the texts of the check; what could only fail later is refused now.

    Args:
        checkpoint: the base.
        examples: whose first rows are the texts; None: texts that come with the project.

    Raises:
        InputError: the base has no task head, no fast tokenizer, or one that does not fit it; or there are no texts.
    """
    checkpoint.require_task_head()
    tokenizer = checkpoint.tokenizer()
    check_padding(checkpoint.name, checkpoint.skeleton(), tokenizer)
    apart = task_named(checkpoint.task).pairs_apart
    pairs = examples is not None and examples.pairs is not None and not apart
    check_ids(checkpoint.name, checkpoint.skeleton(), tokenizer, pairs)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{checkpoint.name} has no fast tokenizer (tokenizer.json), which serving needs")
    return Prepared(checkpoint, tokenizer, choose_texts(examples, apart))


def choose_texts(examples: Examples | None, apart: bool = False) -> Texts:
    """The first rows of `examples`, or texts that come with the project.

    Args:
        examples: labelled or not; None: there are none.
        apart: whether the texts of a pair are read each by itself; then the texts are those of the first pairs.

    Raises:
        InputError: there are no texts.
    """
    if examples is None:
        # Imported here: it is only data, but a serving host has no use for it.
        from qrlora_deploy.data.sample import sample_texts

        return Texts(sample_texts()[:BATCH])
    if not examples.texts:
        raise InputError(f"{examples.name} holds no texts to check the export with")
    if apart and examples.pairs:
        pairs = zip(examples.texts[:BATCH], examples.pairs, strict=False)
        return Texts([text for pair in pairs for text in pair][:BATCH])
    return Texts(examples.texts[:BATCH], examples.pairs[:BATCH] if examples.pairs else None)
