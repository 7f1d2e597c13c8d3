"""transformers' Trainer, made to keep only what is trained, and what both kinds of run share."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from qrlora_deploy.errors import InputError, QrloraError, argument, library_errors
from qrlora_deploy.models.capacity import check_ids, max_tokens
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.support import check_padding
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.training.batches import collator_for
from qrlora_deploy.training.precision import has_bf16, mixed_precision
from qrlora_deploy.training.settings import RunSettings, choose_device, diverged

Progress = Callable[[str, int, int], None]

TRAINABLE = "trainable.safetensors"
UNREADABLE = "cannot be resumed from, by these versions of the libraries; remove its folder and start again"
WARMUP_SHARE = 0.06


class SmallTrainer(Trainer):
    """A Trainer whose checkpoints hold the trainable parameters alone, in safetensors.

    The base is frozen and on disk already. Parameters named in `rates` get a learning rate of
    their own; the others share that of the arguments. The loss is the task's, which transformers may not have.
    Batches that are trained on are made by `train_collator` where there is one, and else as those that are scored.
    """

    def __init__(
        self,
        *args: Any,
        task: Task,
        rates: dict[str, float] | None = None,
        train_collator: Callable[[list[Any]], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.task = task
        self.train_collator = train_collator
        self.rates = rates or {}
        # It prints to stdout, which belongs to the command's result.
        self.remove_callback(PrinterCallback)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        model: Any = self.model
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW without weight decay: a coefficient of zero is the base, not a smaller model."""
        if self.optimizer is None:
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in self.trainable().items():
                groups.setdefault(self.rates.get(name, self.args.learning_rate), []).append(parameter)
            parts = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
            # On a GPU one launch instead of a dozen.
            fused = True if self.args.device.type == "cuda" else None
            self.optimizer = torch.optim.AdamW(parts, lr=self.args.learning_rate, weight_decay=0.0, fused=fused)
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Batches of the training rows."""
        scored = self.data_collator
        self.data_collator = self.train_collator or scored
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = scored

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch, and the logits where they are wanted."""
        batch = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        # Embeddings are made by a part of the model, whose forward the Trainer did not prepare.
        with mixed_precision(self.args.device):
            logits = self.graded(model, batch, inputs["labels"])
        loss = self.task.loss(logits, inputs["labels"])
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def graded(self, model: Any, batch: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        """What the task's loss and metrics take of the model, as `Task.graded`."""
        return self.task.graded(model, batch, targets)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trainable parameters into `output_dir`."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.trainable().items()}
        safetensors.torch.save_file(tensors, folder / TRAINABLE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with library_errors(f"{checkpoint} {UNREADABLE}", InputError):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with library_errors(f"{checkpoint} {UNREADABLE}", InputError):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_trainable(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        # By its name: the folder may have moved since an interrupted run wrote its whole path.
        self.load_trainable(Path(str(self.args.output_dir)) / Path(str(self.state.best_model_checkpoint)).name)

    def load_trainable(self, folder: Path) -> None:
        """Read back what `save_model` wrote.

        Raises:
            InputError: the file is missing, cut, or of another model.
        """
        try:
            tensors = safetensors.torch.load_file(folder / TRAINABLE)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{folder / TRAINABLE} cannot be read: {error}; start again without {argument('resume')}"
            ) from error
        parameters = self.trainable()
        if {name: value.shape for name, value in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
            raise InputError(f"{folder / TRAINABLE} holds other parameters; start again without {argument('resume')}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])


class Watch(TrainerCallback):
    """Reports steps, and stops a run whose loss is no longer a number."""

    def __init__(self, description: str, progress: Progress | None) -> None:
        self.description = description
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step is done."""
        if self.progress:
            self.progress(self.description, state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """The mean loss of an epoch is known."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise QrloraError(diverged(f"the loss became {loss} in epoch {state.epoch:.0f}"))


def training_arguments(folder: Path, settings: RunSettings, rate: float, rows: int, **options: Any) -> Any:
    """Arguments of a run over `rows` rows with the checkpoints, if any, in `folder`.

    Raises:
        ProviderError: CUDA was asked for where there is none.
    """
    device = choose_device(settings.device)
    steps = settings.epochs * math.ceil(rows / settings.batch_size)
    arguments = TrainingArguments(
        output_dir=str(folder.resolve()),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=int(WARMUP_SHARE * steps),
        weight_decay=0.0,
        # The defaults were found without clipping, and Adam bounds its steps itself.
        max_grad_norm=0.0,
        seed=settings.seed,
        use_cpu=device == "cpu",
        bf16=has_bf16(device),
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        # A model without a head takes none, and the Trainer would not score it.
        label_names=["labels"],
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    # With several GPUs the Trainer would split batches by DataParallel, which changes batch_size.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def load_tokenizer(
    checkpoint: Checkpoint,
    model: Any,
    max_length: int,
    pairs: bool = False,
    new_padding: bool = False,
    padded: bool = True,
) -> Any:
    """The tokenizer of a base, which goes with the model.

    Args:
        checkpoint: the base.
        model: of it.
        max_length: tokens of a row.
        pairs: whether the data are pairs of texts.
        new_padding: whether a padding token is chosen where there is none, for tokenizer and model, which are saved.
        padded: whether the tokenizer pads.

    Raises:
        InputError: there is none, it cannot pad, it makes ids that the model has no row for, or `max_length` is
            more than the base can take.
    """
    tokenizer = checkpoint.tokenizer()
    limit = max_tokens(model, tokenizer)
    if max_length > limit:
        raise InputError(
            f"{argument('max_length', max_length)} is more than the {limit} tokens that {checkpoint.name} takes"
        )
    if new_padding:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
    if padded:
        check_padding(checkpoint.name, model, tokenizer)
    check_ids(checkpoint.name, model, tokenizer, pairs)
    return tokenizer


def trainer_parts(task: Task, tokenizer: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """Batching and scoring, as arguments of a Trainer; `names` are those of the outputs."""
    return {
        "task": task,
        "data_collator": collator_for(task, tokenizer),
        "compute_metrics": lambda result: task.score(_finite(result.predictions), result.label_ids, names),
        # Some models return hidden states after the logits.
        "preprocess_logits_for_metrics": lambda out, _: task.by_row(out[0] if isinstance(out, (tuple, list)) else out),
    }


def _finite(logits: np.ndarray) -> np.ndarray:
    # The step after the last logged loss may have been the one that was too long.
    if not np.isfinite(logits).all():
        raise QrloraError(diverged("the model answers NaN or Inf: training diverged"))
    return logits


def check_trained(trainer: SmallTrainer) -> None:
    """Make sure that training did not diverge in its last step, whose effect no loss shows.

    Raises:
        QrloraError: a trained parameter is NaN or Inf.
    """
    wrong = [name for name, value in trainer.trainable().items() if not bool(value.isfinite().all())]
    if wrong:
        raise QrloraError(diverged(f"training diverged: {wrong[0]} is NaN or Inf"))


def evaluate(trainer: Trainer, task: Task) -> dict[str, float]:
    """Metrics on the trainer's evaluation data, rounded for the record."""
    result = trainer.evaluate()
    return {name: round(result[f"eval_{name}"], 6) for name in task.metrics}


def held_out_logits(trainer: Trainer) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[n, labels]` of the trainer's evaluation data, and their targets."""
    found = trainer.predict(trainer.eval_dataset)  # type: ignore[arg-type]
    return np.asarray(found.predictions), np.asarray(found.label_ids)


def no_dropout(config: Any) -> dict[str, float]:
    """Options of `from_pretrained` for a model that drops nothing out, by its config's own names."""
    numbers = {name: value for name, value in config.to_dict().items() if isinstance(value, float)}
    return {name: 0.0 for name in numbers if "drop" in name}


@contextmanager
def explained_failures(folder: Path) -> Iterator[None]:
    """Turn a full disk and a full memory into one line each.

    Raises:
        QrloraError: instead of the error of the library.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QrloraError(
            f"out of GPU memory; try a smaller {argument('batch_size')} or {argument('max_length')}"
        ) from error
    except (OSError, safetensors.SafetensorError) as error:
        raise QrloraError(f"cannot write in {folder}: {error}") from error
    except RuntimeError as error:
        # torch.save has no error class of its own for a failed write.
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise QrloraError(f"cannot write in {folder}: is the disk full?") from error
