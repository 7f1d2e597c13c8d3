"""Who trains: LoRA of PEFT by its Trainer and in a bare loop, and ours on the whole model and on the cached trunk."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks.training_speed.setup import WARM_STEPS, Setup
from qrlora_deploy.models.adapter import QRLoRALinear, attach, precondition
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.training.cached_trainer import (
    CachedTrainer,
    CacheWish,
    Texts,
    build_cached,
    collate_numbers,
    numbered,
)
from qrlora_deploy.training.loop import SmallTrainer
from qrlora_deploy.training.precision import mixed_precision

LORA_RANK = 8


class InOrder(Trainer):
    """The Trainer as it is, except that it takes rows in their order."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class InOrderSmall(InOrder, SmallTrainer):
    """Ours on the whole model."""


class InOrderCached(InOrder, CachedTrainer):
    """Ours on the cached trunk."""


class Clock(TrainerCallback):
    """Notes wall time and the process's CPU time after the first steps and at the end."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.marks: list[tuple[float, float]] = []

    def tick(self, step: int) -> None:
        """A step is done."""
        if step in (WARM_STEPS, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step of a Trainer is done."""
        self.tick(state.global_step)

    def seconds_per_step(self) -> tuple[float, float]:
        """Wall and CPU."""
        (wall, cpu), (wall_end, cpu_end) = self.marks
        count = self.steps - WARM_STEPS
        return (wall_end - wall) / count, (cpu_end - cpu) / count


Subject = Callable[[Clock], Any]


def peft_model(setup: Setup) -> Any:
    """The base with LoRA on the layers of the basis; its head is frozen, as ours is."""
    import peft

    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(setup.basis.names))
    return peft.get_peft_model(setup.model(), config)


def peft_trainer(setup: Setup) -> Subject:
    """PEFT as most use it: the Trainer with padding to the longest row of a batch."""
    trainer = InOrder(
        model=peft_model(setup),
        args=setup.arguments("peft"),
        train_dataset=setup.rows,
        data_collator=DataCollatorWithPadding(setup.tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    return lambda clock: _train(trainer, clock)


def peft_loop(setup: Setup) -> Subject:
    """PEFT in the shortest loop: nothing but the batch, the loss, the gradients and the step."""
    model = peft_model(setup).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=setup.device == "cuda" or None)
    loader: Any = torch.utils.data.DataLoader(
        setup.rows,  # type: ignore[arg-type]
        batch_size=setup.settings.batch_size,
        collate_fn=DataCollatorWithPadding(setup.tokenizer),
        pin_memory=setup.device == "cuda",
    )

    def run(clock: Clock) -> None:
        for step, batch in enumerate(loader, start=1):
            batch = {name: tensor.to(setup.device, non_blocking=True) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            with mixed_precision(torch.device(setup.device)):
                logits = model(**batch).logits
            functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.tick(step)

    return run


def ours(setup: Setup, cached: bool) -> Trainer:
    """The Trainer of `train`, on the whole model or on the cached trunk."""
    model = setup.model()
    precondition(attach(model, setup.basis))
    collate = DataCollatorWithPadding(setup.tokenizer)
    parts: dict[str, Any] = {"model": model, "args": setup.arguments("ours")}
    if not cached:
        return InOrderSmall(**parts, train_dataset=setup.rows, data_collator=collate)
    paths = [path for path, module in model.named_modules() if isinstance(module, QRLoRALinear)]
    texts = Texts(setup.rows, collate, "right")
    upper = build_cached(model, paths, texts, Classification(), CacheWish("auto", setup.folder))
    return InOrderCached(**parts, train_dataset=numbered(setup.rows, 0), data_collator=collate_numbers, cached=upper)


def ours_subject(setup: Setup, cached: bool) -> Subject:
    """`ours` as a subject."""
    trainer = ours(setup, cached)
    return lambda clock: _train(trainer, clock)


def _train(trainer: Trainer, clock: Clock) -> None:
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)


SUBJECTS: dict[str, Callable[[Setup], Subject]] = {
    "PEFT LoRA, Trainer": peft_trainer,
    "PEFT LoRA, bare loop": peft_loop,
    "ours, whole model": lambda setup: ours_subject(setup, False),
    "ours, cached trunk": lambda setup: ours_subject(setup, True),
}
