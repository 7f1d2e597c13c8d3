"""What a graph answers, against PyTorch in fp32: rows of different lengths, another customer in each."""

from typing import Any

import numpy as np
import torch

from benchmarks.decoding.graphs import Made, Writer
from qrlora_deploy.models.adapter import detach, insert, set_coefficients

STEPS = 4
"""Tokens that every row is made to say behind its prompt."""

BOUNDS = {"fp32": 1e-3, "fp16": 0.05, "int4": 8.0}
"""Of the largest error, by the logits' standard deviation, as the exporter's own check has it in 16 and 4 bits."""


class CheckError(Exception):
    """A contender computes something else."""


def check(
    made: Made, session: Any, model: Any, customers: np.ndarray, device: str, precision: str, prompt: int, number: int
) -> dict[str, float]:
    """Hold prompts and forced steps against PyTorch, once as they come and once replayed.

    Args:
        model: of transformers, in fp32.
        customers: `[customers, total_rank]`; the rows are those of customers 1, 0 and 2.
        precision: key of `BOUNDS`.
        number: `gpu_graph_id`.

    Returns:
        The largest error by the standard deviation, that deviation, what customers do, and the share of equal likeliest
        tokens.

    Raises:
        CheckError: the error is above its bound, or another token is the likeliest where the two best are further
            apart than twice the bound.
    """
    slots, vocabulary = [1, 0, 2], model.config.vocab_size
    lengths = [prompt, max(1, prompt * 2 // 3), max(1, prompt // 5)]
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocabulary, (3, prompt), generator=random).to(device)
    forced = torch.randint(3, vocabulary, (STEPS, 3, 1), generator=random).to(device)
    where = torch.tensor(slots, device=device)
    writer = Writer(session, device, 3, prompt, STEPS + 1, made.table, where, lengths, number)
    # The second time everything is replayed, with what the first left in the caches.
    for _ in range(2):
        found = [writer.read(ids).clone()] + [writer.write(one).clone() for one in forced]
    answers = torch.stack(found, dim=1)
    expected = _reference(made, model, customers[slots], ids, lengths, forced)
    base = _reference(made, model, customers[[0, 0, 0]], ids, lengths, forced)
    spread = float(expected.std())
    error = float((answers - expected).abs().max()) / spread
    best = expected.topk(2).values
    apart = (best[..., 0] - best[..., 1]) > 2 * error * spread
    same = answers.argmax(dim=-1) == expected.argmax(dim=-1)
    if not error <= BOUNDS[precision]:
        raise CheckError(f"{made.name}: logits are {error:.1e} standard deviations off, more than {BOUNDS[precision]}")
    if not bool(same[apart].all()) or not bool((writer.chosen.view(-1) == answers[:, -1].argmax(dim=-1)).all()):
        raise CheckError(f"{made.name}: another token is the likeliest")
    return {
        "error": error,
        "spread": spread,
        "customers_effect": float((expected - base).abs().max()) / spread,
        "same_token": float(same.float().mean()),
    }


def _reference(
    made: Made, model: Any, values: np.ndarray, ids: torch.Tensor, lengths: list[int], forced: torch.Tensor
) -> torch.Tensor:
    """`[rows, steps + 1, vocabulary]` of each row alone, without a cache."""
    adapters = insert(model, made.basis)
    try:
        rows = []
        for row, (length, one) in enumerate(zip(lengths, values, strict=True)):
            if adapters:
                set_coefficients(adapters, made.basis, one)
            tokens = torch.cat([ids[row, :length], forced[:, row, 0]])[None]
            with torch.no_grad():
                rows.append(model(input_ids=tokens, use_cache=False).logits[0, length - 1 :].float())
        return torch.stack(rows)
    finally:
        detach(model)
