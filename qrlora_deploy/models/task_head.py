"""Which task a base is for: by its class and config, and by what its user says where these leave it open."""

from typing import Any

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.models.model_config import is_encoder
from qrlora_deploy.tasks.base import TASK_FIELD
from qrlora_deploy.tasks.causal_lm import CausalLM
from qrlora_deploy.tasks.registry import BY_NAME, has_task_head, task_of_config, writes_text


def task_of(config: Any, architecture: str, outputs: int, wanted: str) -> str:
    """The name of the task of a model that `check_task_head` has accepted.

    Args:
        config: of the model.
        architecture: name of its class.
        outputs: of its head; 0 where there is none.
        wanted: name of the task that it is taken for; empty: nobody said so.
    """
    if writes_text(architecture):
        return CausalLM.name
    said = str(getattr(config, TASK_FIELD, ""))
    if not outputs:
        return wanted or said
    found = task_of_config(config.problem_type, outputs, architecture, said)
    # What the config says counts more than what it is taken for.
    return found.name if found.name == said else task_of_config(config.problem_type, outputs, architecture, wanted).name


def check_task_head(name: str, config: Any, architecture: str, task: str) -> None:
    """Make sure that a model has a task head, or that an encoder without is what a task needs.

    Args:
        name: of the checkpoint, for messages.
        config: of the model.
        architecture: name of its class.
        task: name of the task that it is taken for; empty: the one that its config names.

    Raises:
        InputError: there is no head, with the ways to one; or there is one and the task has none.
    """
    if writes_text(architecture):
        if task and task != CausalLM.name:
            raise InputError(
                f"{name} is a {architecture}, which writes text; give it a head for {task} with `warmup` first"
            )
        return
    task = task or str(getattr(config, TASK_FIELD, ""))
    if task in BY_NAME and BY_NAME[task].writes_text:
        raise InputError(
            f"{name} is a {architecture}; {task} needs a decoder that writes text, such as LlamaForCausalLM"
        )
    headless = task in BY_NAME and not BY_NAME[task].has_labels
    if has_task_head(architecture) and headless:
        raise InputError(f"{name} is a {architecture} with a task head; {task} needs an encoder without")
    if not has_task_head(architecture) and not (headless and is_encoder(architecture)):
        raise InputError(
            f"{name} is a {architecture} without a task head; give it one with `warmup` first, or take it for "
            f"embeddings by {argument('task', 'embedding')}"
        )
