"""What every client opens, and the tokens that it must give: greedy ones of PyTorch, row by row, without a cache."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qrlora_deploy as qr
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.runtime.bundle.row_layout import TableLayout

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "A good recipe for bread begins with flour and",
)
NAMES = ("base", "acme", "globex")
SCALE = 0.12
"""Of made-up coefficients, on all layers of a base; strong enough that greedy answers differ."""
MARGIN = 1e-3
"""A likeliest token that is not ahead by this share of the logits' deviation may come out otherwise in another sum."""


def prepare(base: str, folder: Path, steps: int, targets: Sequence[str], rank: int, builder: str) -> None:
    """Exports of all kinds, and `expected.json`, in a new folder.

    Args:
        base: folder or hub name of a decoder.
        folder: is made.
        steps: tokens of each answer.
        targets: layers of the basis; none: all linear ones.
        rank: of each.
        builder: of the graphs, as `export --builder` takes it.
    """
    checkpoint = open_checkpoint(base)
    folder.mkdir(parents=True)
    basis = qr.factorize(checkpoint, targets=targets, rank=rank)
    basis.save(str(folder / "basis.safetensors"))
    customers = _customers(checkpoint, basis)
    for name, customer in customers.items():
        customer.save(str(folder / f"{name}.safetensors"))
    _export(checkpoint, basis, customers, folder, builder)
    _write_expected(checkpoint, basis, customers, folder, steps)


def _customers(checkpoint: Checkpoint, basis: Basis) -> dict[str, Coefficients]:
    random = np.random.default_rng(5)
    facts = {"base_name": checkpoint.name, "base_digest": checkpoint.digest, "task": "text-generation", "labels": ()}

    def one(scale: float) -> Coefficients:
        drawn = scale * random.standard_normal(basis.total_rank).astype(np.float32)
        return Coefficients(drawn, basis.digest, **facts)  # type: ignore[arg-type]

    return {name: one(0.0 if name == "base" else SCALE) for name in NAMES}


def _export(
    checkpoint: Checkpoint, basis: Basis, customers: dict[str, Coefficients], folder: Path, builder: str
) -> None:
    qr.export(checkpoint, basis, folder / "rows", format="genai", variant="rows", builder=builder)
    qr.export(checkpoint, basis, folder / "drop-in", format="genai", variant="drop-in", builder=builder)
    for name in NAMES[1:]:
        own: dict[str, Any] = {"coefficients": customers[name]}
        qr.export(checkpoint, basis, folder / f"{name}.onnx_adapter", format="onnx-adapter", **own)
        qr.export(checkpoint, basis, folder / f"{name}-peft", format="peft", **own)
    acme: dict[str, Any] = {"coefficients": customers["acme"]}
    qr.export(checkpoint, basis, folder / "merged", format="genai", builder=builder, **acme)
    qr.merge(checkpoint, basis, customers["acme"], folder / "acme-merged")
    layout = TableLayout(list(basis.ranks.values()))
    np.save(folder / "table.npy", np.stack([layout.row(customer.values) for customer in customers.values()]))


def _write_expected(
    checkpoint: Checkpoint, basis: Basis, customers: dict[str, Coefficients], folder: Path, steps: int
) -> None:
    tokenizer = checkpoint.tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    model = checkpoint.load_model()
    answers = {}
    for name, customer in customers.items():
        qr.load_customer(model, basis, customer)
        answers[name] = [greedy(model, prompt, steps) for prompt in prompts]
    genai = json.loads((folder / "rows/genai_config.json").read_text(encoding="utf-8"))["model"]
    ends = genai["eos_token_id"]
    expected = {
        "base": str(checkpoint.folder.resolve()),
        "texts": PROMPTS,
        "prompts": prompts,
        "names": NAMES,
        "steps": steps,
        "answers": answers,
        "table": np.load(folder / "table.npy").tolist(),
        "padding": genai["pad_token_id"],
        "ends": ends if isinstance(ends, list) else [ends],
    }
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def greedy(model: Any, prompt: Sequence[int], steps: int) -> dict[str, Any]:
    """The likeliest tokens, and how many of them are clearly the likeliest."""
    import torch

    tokens, sure = list(prompt), None
    for step in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        best = logits.topk(2).values
        if sure is None and float(best[0] - best[1]) < MARGIN * float(logits.std()):
            sure = step
        tokens.append(int(logits.argmax()))
    return {"tokens": tokens[len(prompt) :], "sure": steps if sure is None else sure}
