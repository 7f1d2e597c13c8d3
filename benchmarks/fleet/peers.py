"""The peers of a fleet: PEFT's LoRA on one customer after another, in a plain loop and by transformers' Trainer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, get_linear_schedule_with_warmup
from transformers.trainer_callback import PrinterCallback

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.training.loop import WARMUP_SHARE, load_tokenizer, no_dropout
from qrlora_deploy.training.rows import Rows, build_rows
from qrlora_deploy.training.settings import TrainSettings

RATE = 5e-4
RANK = 8


@dataclass(frozen=True)
class Peer:
    """A base that is loaded once, and what LoRA adapts in it.

    Attributes:
        model: without adapters between customers.
        tokenizer: of the base.
        labels: of the base's head, which stays frozen.
        targets: module paths, those of the fleet.
        settings: epochs, batch size, length and seed, those of the fleet.
        device: "cpu" or "cuda".
    """

    model: Any
    tokenizer: Any
    labels: tuple[str, ...]
    targets: list[str]
    settings: TrainSettings
    device: str

    def rows(self, examples: Examples) -> Rows:
        """Tokens and targets of a customer."""
        targets = Classification().encode(examples, self.labels)
        return build_rows(self.tokenizer, examples, targets, self.settings.max_length)


def open_peer(checkpoint: Checkpoint, targets: list[str], settings: TrainSettings, device: str) -> Peer:
    """Load the base once, without dropout, as the fleet has it."""
    model = checkpoint.load_model(**no_dropout(checkpoint.config)).to(device)
    tokenizer = load_tokenizer(checkpoint, model, settings.max_length)
    return Peer(model, tokenizer, checkpoint.labels, targets, settings, device)


@dataclass(frozen=True)
class Cost:
    """Of one run.

    Attributes:
        seconds: wall clock.
        cpu_seconds: of all threads of this process; what other processes do is not in it.
    """

    seconds: float
    cpu_seconds: float


def cost_of(work: Callable[[], object]) -> Cost:
    """What some work takes, to its last kernel."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Cost(time.perf_counter() - start, time.process_time() - cpu)


def train_in_loop(peer: Peer, examples: Examples) -> None:
    """LoRA in a loop of plain PyTorch: nothing but what training needs."""
    settings = peer.settings
    tuned: Any = get_peft_model(peer.model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=peer.targets))
    tuned.train()
    collate: Any = DataCollatorWithPadding(peer.tokenizer)
    generator = torch.Generator().manual_seed(settings.seed)
    rows: Any = peer.rows(examples)
    loader: Any = DataLoader(rows, settings.batch_size, shuffle=True, collate_fn=collate, generator=generator)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    steps = settings.epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP_SHARE * steps), steps)
    for _ in range(settings.epochs):
        for batch in loader:
            with torch.autocast(peer.device, torch.bfloat16, enabled=peer.device == "cuda"):
                loss = tuned(**{name: tensor.to(peer.device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    tuned.unload()


def train_by_trainer(folder: Path) -> Callable[[Peer, Examples], None]:
    """LoRA as PEFT's own examples train it; `folder` is for the Trainer, which writes nothing there."""

    def train(peer: Peer, examples: Examples) -> None:
        settings = peer.settings
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=peer.targets)
        tuned: Any = get_peft_model(peer.model, config)
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=RATE,
            warmup_steps=0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=peer.device == "cpu",
            bf16=peer.device == "cuda",
            dataloader_pin_memory=peer.device == "cuda",
            seed=settings.seed,
        )
        rows: Any = peer.rows(examples)
        trainer = Trainer(
            model=tuned, args=arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(peer.tokenizer)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        tuned.unload()

    return train
