"""Training a customer: the coefficients `c`, and the output layer where that is asked for."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerState

from qrlora_deploy.data.examples import Examples, check_alike
from qrlora_deploy.errors import QrloraError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.adapter import QRLoRALinear, attach, get_coefficients, precondition
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.head import check_stored, prepare_head
from qrlora_deploy.tasks.answer_rows import answer_rows
from qrlora_deploy.training.batches import collator_for
from qrlora_deploy.training.cached_decoder import CachedDecoderTrainer
from qrlora_deploy.training.cached_trainer import (
    CachedModel,
    CachedTrainer,
    collate_numbers,
    numbered,
)
from qrlora_deploy.training.caching import Cached, cache_trunk
from qrlora_deploy.training.checkpoints import STATE, Sealing, open_work_dir
from qrlora_deploy.training.forward_only import check_reads_forward
from qrlora_deploy.training.label_likelihoods import LabelRows, label_rows
from qrlora_deploy.training.loop import (
    Progress,
    SmallTrainer,
    Watch,
    evaluate,
    explained_failures,
    held_out_logits,
    load_tokenizer,
    no_dropout,
    trainer_parts,
    training_arguments,
)
from qrlora_deploy.training.outputs import Outputs, customer_outputs, encode_rows, taken_for
from qrlora_deploy.training.record import Ran, training_record
from qrlora_deploy.training.rows import Rows, build_rows, texts_of
from qrlora_deploy.training.settings import TrainSettings, choose_device, diverged, fingerprint
from qrlora_deploy.training.starting import begin_from, check_start, start_record
from qrlora_deploy.training.trunk.memory import CacheWish
from qrlora_deploy.training.tuning import Tuned, tune


@dataclass(frozen=True)
class _Job:
    """A model ready to train, its rows, and what they mean."""

    model: Any
    adapters: dict[str, QRLoRALinear]
    head: dict[str, nn.Parameter]
    tokenizer: Any
    rows: Rows
    evaluation: Rows | None
    outputs: Outputs
    settings: TrainSettings
    label_rows: LabelRows | None = None

    def scores(self, trainer: SmallTrainer) -> dict[str, float]:
        """Metrics on the held-out rows, where there are any."""
        found = evaluate(trainer, self.outputs.task) if self.evaluation else {}
        if self.label_rows is None:
            return found
        return found | self.label_rows.score(self.model, trainer.data_collator, self.settings.batch_size)


def train(
    checkpoint: Checkpoint,
    basis: Basis,
    train: Examples,
    evaluation: Examples | None,
    settings: TrainSettings,
    work_dir: Path,
    resume: bool = False,
    basis_file: str = "",
    progress: Progress | None = None,
    start: Coefficients | None = None,
) -> Coefficients:
    """Train one customer on labelled text.

    With evaluation data the best epoch by the metric is kept and the run stops early; without, the
    last epoch is kept. The checkpoint and the basis are not changed.

    Args:
        checkpoint: the base, with its task head.
        basis: made from this base.
        train: the customer's examples. With a frozen head their labels must be among the base's;
            with `head="output"` another set of labels gets a new output layer.
        evaluation: held-out examples, or None.
        settings: how to train.
        work_dir: folder of the run, made if it is missing, which stays for the caller to remove. An
            interrupted run leaves what `resume` continues from.
        resume: go on from the last whole checkpoint in `work_dir`; from the start if there is none.
        basis_file: where the basis is, for the record.
        progress: called with (description, done, total) after each step.
        start: a customer to go on from; None: the base.

    Raises:
        InputError: the data, the settings, `start` or `work_dir` do not fit; nothing was trained.
        BasisMismatchError: the basis was made from other weights, or `start` is of another one.
        ProviderError: CUDA was asked for where there is none.
        QrloraError: the loss diverged, or the disk or the memory is full.
    """
    device = choose_device(settings.device)
    checkpoint = taken_for(checkpoint, settings.task)
    check_basis_fits(checkpoint, basis)
    outputs = customer_outputs(checkpoint, train, settings.head, settings.task)
    settings = settings.resolved(basis, outputs.task.rate_factor, len(train))
    metric = settings.metric_of(outputs.task)
    settings.check_tuning(outputs.task, evaluation is not None)
    settings.check_batches(outputs.task, len(train))
    settings.check_packing(outputs.task)
    if start is not None:
        check_start(start, checkpoint, basis, outputs, settings.head)
    job = _prepare(checkpoint, basis, train, evaluation, outputs, settings)
    if start is not None:
        begin_from(start, basis, job.adapters, job.head)
    job.model.to(device)
    data = {"data_digest": train.digest, "evaluation_digest": evaluation.digest if evaluation else None}
    origin = {"basis_digest": basis.digest, "base_digest": checkpoint.digest} | start_record(start)
    last = open_work_dir(work_dir, fingerprint(settings, **data, **origin), resume)
    with explained_failures(work_dir):
        cached, cache_place = cache_trunk(
            job.model,
            outputs.task,
            job.tokenizer,
            job.rows + (job.evaluation or []),
            settings,
            CacheWish(settings.trunk_cache, work_dir, progress),
        )
        trainer = _build_trainer(job, cached, metric, work_dir, progress)
        baseline = {} if outputs.new and start is None else job.scores(trainer)
        loss = _run(trainer, last, settings)
        metrics = job.scores(trainer)
        tuned = tune(outputs.task, *held_out_logits(trainer)) if settings.tune_thresholds else Tuned()
    values = get_coefficients(job.adapters)
    head = {name: parameter.detach().float().cpu().numpy() for name, parameter in job.head.items()}
    if not all(np.isfinite(array).all() for array in (values, *head.values())):
        raise QrloraError(diverged("training diverged: a coefficient is NaN or Inf"))
    ran = Ran(
        steps=trainer.state.global_step,
        epochs=round(float(trainer.state.epoch or 0), 2),
        metric=metric,
        metrics=metrics,
        baseline=baseline,
        loss=loss,
        device=device,
        trunk_cache=cache_place,
        remark=job.outputs.remark,
        tuned=tuned,
    )
    return Coefficients(
        values=values,
        base_name=checkpoint.name,
        task=outputs.task.name,
        labels=outputs.labels,
        head=head,
        basis_file=basis_file,
        training=training_record(train, evaluation, settings, ran) | start_record(start),
        thresholds=tuned.thresholds,
        basis_digest=basis.digest,
        base_digest=checkpoint.digest,
    )


def _prepare(
    checkpoint: Checkpoint,
    basis: Basis,
    train: Examples,
    evaluation: Examples | None,
    outputs: Outputs,
    settings: TrainSettings,
) -> _Job:
    check_alike(train, evaluation)
    parts = [part for part in (train, evaluation) if part is not None]
    targets = encode_rows(outputs, train, evaluation, settings.head == "frozen")
    task = outputs.task
    model = checkpoint.load_model(**outputs.options, **_loading(checkpoint, settings))
    pairs = train.pairs is not None and not task.pairs_apart
    tokenizer = load_tokenizer(checkpoint, model, settings.max_length, pairs, padded=not task.writes_text)
    new_bias = outputs.bias if outputs.new else None
    head = prepare_head(model, basis, new_bias, settings.seed) if settings.head == "output" else {}
    check_stored(head, checkpoint)
    adapters = attach(model, basis)
    precondition(adapters)
    for parameter in head.values():
        parameter.requires_grad_(True)
    if task.writes_text:
        made = [answer_rows(tokenizer, part, settings.max_length) for part in parts]
        rows = [part.rows for part in made]
        outputs = replace(outputs, remark=made[0].remark(settings.max_length))
        check_reads_forward(model, rows[0], settings.packing)
        labelled = label_rows(tokenizer, train, evaluation, settings.max_length)
    else:
        labelled = None
        rows = [build_rows(tokenizer, *pair, settings.max_length, task) for pair in zip(parts, targets, strict=False)]
    held_out = rows[1] if evaluation else None
    return _Job(model, adapters, head, tokenizer, rows[0], held_out, outputs, settings, labelled)


def _loading(checkpoint: Checkpoint, settings: TrainSettings) -> dict[str, Any]:
    """Options of `load_model` that settings ask for."""
    dtype = {} if settings.base_dtype == "fp32" else {"dtype": torch.bfloat16}
    return dtype if settings.dropout else dtype | no_dropout(checkpoint.config)


def _build_trainer(
    job: _Job, cached: Cached | None, metric: str, work_dir: Path, progress: Progress | None
) -> SmallTrainer:
    settings = job.settings
    options: dict[str, Any] = {"save_strategy": "epoch"}
    callbacks: list[Any] = [Watch("train", progress), Sealing()]
    if job.evaluation:
        options |= {
            "eval_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": metric,
            "greater_is_better": metric not in job.outputs.task.lower_is_better,
            # The patience that is used up belongs to what is resumed.
            "restore_callback_states_from_checkpoint": True,
        }
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings.patience))
    parts: dict[str, Any] = {
        "model": job.model,
        "args": training_arguments(work_dir, settings, settings.rate, len(job.rows), **options),
        "train_dataset": job.rows,
        "eval_dataset": job.evaluation,
        "callbacks": callbacks,
        "rates": dict.fromkeys(job.head, settings.head_learning_rate),
        **trainer_parts(job.outputs.task, job.tokenizer, job.outputs.labels),
    }
    if not isinstance(cached, CachedModel):
        packed = collator_for(job.outputs.task, job.tokenizer, settings.max_length) if settings.packing else None
        parts["train_collator"] = packed
        if cached is None:
            return SmallTrainer(**parts)
        held_out = cached.placed(job.evaluation, len(job.rows)) if job.evaluation else None
        parts |= {"train_dataset": cached.placed(job.rows, 0), "eval_dataset": held_out}
        return CachedDecoderTrainer(**parts, cached=cached)
    start = sum(len(texts_of(row)) for row in job.rows)
    evaluation = numbered(job.evaluation, start) if job.evaluation else None
    # Without padding in the upper part, what there is comes behind the texts.
    side = job.tokenizer.padding_side if cached.upper is None else "right"
    collate = partial(collate_numbers, padding_side=side)
    parts |= {"train_dataset": numbered(job.rows, 0), "eval_dataset": evaluation, "data_collator": collate}
    return CachedTrainer(**parts, cached=cached)


def _run(trainer: SmallTrainer, last: Path | None, settings: TrainSettings) -> float:
    """Train from the checkpoint `last` or from the start; returns the mean loss of the last epoch."""
    if last is not None:
        state = TrainerState.load_from_json(str(last / STATE))
        stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {})
        if stopping.get("attributes", {}).get("early_stopping_patience_counter", 0) >= settings.patience:
            # It had stopped early: the Trainer would forget that and train one more epoch.
            trainer.state = state
            trainer._load_best_model()
            return _last_loss(state)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return _last_loss(trainer.state)


def _last_loss(state: TrainerState) -> float:
    return next((round(float(entry["loss"]), 6) for entry in reversed(state.log_history) if "loss" in entry), 0.0)
