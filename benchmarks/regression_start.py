"""Why a new head for numbers starts at the mean of the labels: a warm-up from a bias of 0 beside one from the mean.

    python -m benchmarks.regression_start --model MPNET_FOLDER --data GLUE_FOLDER \\
        --out benchmarks/results/regression_start.json

STS-B, whose labels go from 0 to 5. Both warm-ups have the same head, rows and rates. Every few steps 32 dev rows
say how alike the hidden states are that the head reads (mean cosine of all pairs), how far the answers are spread,
and how they correlate with the labels.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.common.measuring import environment
from benchmarks.glue.starts import WARMUP_RATE, WARMUP_SHARE, Models
from benchmarks.glue.tasks import TASKS, Rows, read_tokens, write_tokens
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import open_checkpoint

TASK = TASKS["STS-B"]
STEPS, BATCH, RISING, EVERY = 40, 8, 8, 5
"""Steps, rows a step, steps in which the rate rises, steps between two looks."""
LENGTH, LOOKED_AT = 40, 32
"""Tokens and dev rows."""


def look(model: Any, rows: Rows) -> dict[str, float]:
    """The likeness of what the head reads, and what it answers."""
    model.eval()
    chosen = np.arange(LOOKED_AT)
    batch = rows.batch(chosen, torch.from_numpy(chosen))
    with torch.inference_mode():
        hidden = functional.normalize(model.base_model(**batch).last_hidden_state[:, 0], dim=1)
        answers = model(**batch).logits[:, 0]
    model.train()
    pairs = LOOKED_AT * (LOOKED_AT - 1)
    correlation = np.corrcoef(answers.numpy(), rows.targets[:LOOKED_AT].numpy())[0, 1]
    return {
        "cosine": round(float((hidden @ hidden.T).sum() - LOOKED_AT) / pairs, 3),
        "mean": round(float(answers.mean()), 3),
        "spread": round(float(answers.std()), 4),
        "pearson": round(float(correlation), 3),
    }


def warm_up(model: Any, parts: dict[str, Rows], seed: int) -> list[dict[str, float]]:
    """Train all of `model` and look at it along the way."""
    rows = parts["train"]
    order = np.random.default_rng(seed).permutation(len(rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP_RATE, weight_decay=0.0)
    found = [{"step": 0} | look(model, parts["dev"])]
    torch.manual_seed(seed)
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = WARMUP_RATE * min(1.0, step / RISING)
        chosen = order[(step - 1) * BATCH : step * BATCH]
        index = torch.from_numpy(chosen)
        loss = functional.mse_loss(model(**rows.batch(chosen, index)).logits[:, 0], rows.targets[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            found.append({"step": step, "loss": round(float(loss.detach()), 3)} | look(model, parts["dev"]))
            print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Parse, warm up twice, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained encoder")
    parser.add_argument("--data", required=True, help="folder with STS-B/train.tsv and STS-B/dev.tsv, or hub")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(TASK, arguments.data, checkpoint, Path(folder) / "tokens", LENGTH)
        parts, _ = read_tokens(Path(folder) / "tokens", "cpu")
    parts["train"] = parts["train"].first(WARMUP_SHARE, arguments.seed)
    mean = float(parts["train"].targets.mean())
    models = Models(checkpoint, "cpu")
    runs = {
        name: warm_up(models.fresh(TASK, 1, arguments.seed, bias), parts, arguments.seed)
        for name, bias in (("0", 0.0), ("mean", mean))
    }
    for name, steps in runs.items():
        print(f"bias {name}: {steps[-1]}")
    if arguments.out:
        what = {
            "model": Path(arguments.model).name,
            "rate": WARMUP_RATE,
            "batch": BATCH,
            "seed": arguments.seed,
            "mean": mean,
        }
        write_json(arguments.out, {"environment": environment("cpu"), **what, "runs": runs})


if __name__ == "__main__":
    main()
