"""Warm-up: ordinary fine-tuning before factorizing, which gives a pretrained encoder its task head."""

from pathlib import Path
from typing import Any

import torch

from qrlora_deploy.data.examples import Examples, check_alike
from qrlora_deploy.io.files import atomic_folder, write_json
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.io.temporary import scratch_folder
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.completeness import compare, is_head
from qrlora_deploy.models.head import set_thresholds, start_bias
from qrlora_deploy.models.loading import LOADING, load_weights, make_skeleton
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.training.loop import (
    Progress,
    SmallTrainer,
    Watch,
    check_trained,
    evaluate,
    explained_failures,
    load_tokenizer,
    trainer_parts,
    training_arguments,
)
from qrlora_deploy.training.outputs import Outputs, encode_rows, own_outputs, taken_for
from qrlora_deploy.training.rows import build_rows
from qrlora_deploy.training.settings import WarmupSettings, choose_device


def warmup(
    checkpoint: Checkpoint,
    train: Examples,
    evaluation: Examples | None,
    output: Path,
    settings: WarmupSettings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune a base on labelled text and write it, with its tokenizer, as a new checkpoint.

    A head whose labels include those of the data is kept; else a new one is made for them. The bias of
    a new one for numbers starts at their mean.

    Args:
        checkpoint: an encoder with or without a task head.
        train: examples of every label that customers will use.
        evaluation: held-out examples for the report, or None.
        output: folder of the new checkpoint (safetensors, fp32); must not hold anything yet.
        settings: how to train.
        progress: called with (description, done, total) after each step.

    Returns:
        The report, which is also written to `warmup.json` in the folder.

    Raises:
        InputError: the data, the base or the output do not fit; nothing is written.
        ProviderError: CUDA was asked for where there is none.
        QrloraError: the loss diverged, or the disk or the memory is full; nothing is left behind.
    """
    check_free_folder(output)
    device = choose_device(settings.device)
    checkpoint = taken_for(checkpoint, settings.task)
    checkpoint.check_family()
    outputs = own_outputs(checkpoint, train, settings.task)
    check_alike(train, evaluation)
    parts = [part for part in (train, evaluation) if part is not None]
    targets = encode_rows(outputs, train, evaluation)
    torch.manual_seed(settings.seed)  # of the new head
    model = _load(checkpoint, outputs)
    if outputs.new and outputs.bias:
        start_bias(model, outputs.bias)
    tokenizer = load_tokenizer(checkpoint, model, settings.max_length, train.pairs is not None, new_padding=True)
    trained = _choose_parameters(model, settings.mode)
    rows = [
        build_rows(tokenizer, *pair, settings.max_length, outputs.task) for pair in zip(parts, targets, strict=False)
    ]
    with explained_failures(output), scratch_folder() as scratch:
        trainer = SmallTrainer(
            model=model,
            args=training_arguments(scratch, settings, settings.rate, len(train), save_strategy="no"),
            train_dataset=rows[0],
            eval_dataset=rows[1] if evaluation else None,
            callbacks=[Watch("warm up", progress)],
            **trainer_parts(outputs.task, tokenizer, outputs.labels),
        )
        trainer.train()
        check_trained(trainer)
        metrics = evaluate(trainer, outputs.task) if evaluation else {}
    report = {
        "base_name": checkpoint.name,
        "task": outputs.task.name,
        "labels": list(outputs.labels),
        **({"remark": outputs.remark} if outputs.remark else {}),
        "mode": settings.mode,
        "learning_rate": settings.rate,
        "epochs": settings.epochs,
        "steps": trainer.state.global_step,
        "seed": settings.seed,
        "rows": len(train),
        "data_digest": train.digest,
        "trained_parameters": trained,
        "metrics": metrics,
        "device": device,
    }
    with atomic_folder(output) as folder:
        set_thresholds(model.config, ())  # of another head, where the base is a merged customer
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "warmup.json", report)
    return report


def _load(checkpoint: Checkpoint, outputs: Outputs) -> Any:
    kind = checkpoint.class_for(outputs.task)
    meant = _new_tensors(checkpoint, outputs)
    return load_weights(checkpoint.folder, checkpoint.config, kind, meant, **outputs.options)


def _new_tensors(checkpoint: Checkpoint, outputs: Outputs) -> set[str]:
    """The tensors that are drawn anew: a head, and a pooler, that the base lacks as a whole.

    Raises:
        InputError: anything else is missing, or `factorize` could not take the result.
    """
    checkpoint.check_plain()
    fields = {name: value for name, value in outputs.options.items() if name not in LOADING}
    model = make_skeleton(checkpoint.folder, checkpoint.config, checkpoint.class_for(outputs.task), **fields)
    missing = set(compare(model, checkpoint.stored).missing)
    head = {name for name in model.state_dict() if is_head(model, name)}
    pooler = {name for name in head if "pooler" in name.split(".")}
    meant: set[str] = set()
    if outputs.new or head - pooler <= missing:
        meant |= head - pooler
    if pooler <= missing:
        meant |= pooler
    checkpoint.check_holds(model, meant)
    for name in choose_targets(model):
        checkpoint.tensor_of(name, model)
    return meant


def _choose_parameters(model: Any, mode: str) -> int:
    """Freeze what the mode does not train; returns the number of parameters left."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(mode == "full" or is_head(model, name))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
