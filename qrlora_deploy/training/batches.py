"""How rows of a task become a batch."""

from collections.abc import Callable
from typing import Any

from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from qrlora_deploy.tasks.base import Task
from qrlora_deploy.training.answers import AnswerCollator
from qrlora_deploy.training.rows import Row, collate_pairs


def collator_for(task: Task, tokenizer: Any, room: int | None = None) -> Callable[[list[Row]], Any]:
    """What makes a batch of rows.

    Args:
        task: of the rows.
        tokenizer: of the base, which pads; not where a task writes text.
        room: tokens of a row of the batch that rows which are written on may share; None: they do not.
    """
    if task.writes_text:
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        return AnswerCollator(next((token for token in known if token is not None), 0), room)
    pad = (DataCollatorForTokenClassification if task.answers_words else DataCollatorWithPadding)(tokenizer)
    return collate_pairs(pad) if task.pairs_apart else pad
