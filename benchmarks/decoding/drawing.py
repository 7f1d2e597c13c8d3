"""Tokens a second of rows that draw, on the GPU by the host, beside greedy ones, through the runtime's own session.

Random weights give flat logits, so temperatures are low: over them logits spread as those of a trained model do at
about 1, and some tens of tokens hold nearly all.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.decoding.batching import export
from benchmarks.decoding.shapes import SHAPES
from qrlora_deploy.runtime.generation.cuda_draw import CudaDrawer
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.sampling import Choice, Sampling
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.runtime.generation.wishes import Wish

SPREAD = 4.5
"""Standard deviation of logits over the temperature."""

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "top-k 50, top-p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "top-p 0.95, penalty 1.1": {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1},
}
"""Temperatures are in units of the one that gives `SPREAD`."""


class _Counted:
    """How many tokens were asked of the drawing graph, and how many it knew."""

    def __init__(self) -> None:
        self.asked, self.known = 0, 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is drawn within."""
        own = CudaDrawer.draw

        def draw(drawer: CudaDrawer, rows: int, wishes: Mapping[int, Wish]) -> dict[int, Choice]:
            found = own(drawer, rows, wishes)
            self.asked, self.known = self.asked + len(wishes), self.known + len(found)
            return found

        with patch.object(CudaDrawer, "draw", draw):
            yield


def measure_drawing(folder: Path, name: str, device: str, rows: int, new: int, rounds: int) -> dict[str, Any]:
    """Both ways in turns; every answer must be the same both ways but for rounding.

    Args:
        rows: that are written side by side.
        new: tokens of each answer.
        rounds: of which the median is taken.
    """
    bundle = export(folder, name, device)
    options: dict[str, Any] = {"provider": device, "max_rows": rows, "batches": [rows], "max_cache_bytes": 2**33}
    found: dict[str, Any] = {"shape": name, "rows": rows, "new": new, "spread": SPREAD, "kinds": {}}
    with GenerationSession.open(bundle, customers=folder / "customers", **options) as session:
        temperature = _spread(folder / "base", SHAPES[name].config["vocab_size"]) / SPREAD
        for kind, sampled in KINDS.items():
            requests = _requests(session, folder, name, rows, new, sampled, temperature)
            found["kinds"][kind] = _measure(session, requests, rounds)
            print(f"{name}, {kind}: {found['kinds'][kind]}", flush=True)
    return found


def _measure(session: GenerationSession, requests: list[GenerationRequest], rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"device": [], "host": []}
    texts: dict[str, list[tuple[int, ...]]] = {}
    counted = _Counted()
    for _ in range(rounds + 1):
        for way, taken in seconds.items():
            with counted.counting(), _drawing(session, way):
                start = time.perf_counter()
                answers = session.answers(requests)
            taken.append((time.perf_counter() - start) / sum(len(answer.tokens) for answer in answers))
            texts[way] = [answer.tokens for answer in answers]
            if error := next((answer.error for answer in answers if answer.error), None):
                raise error
    same = np.mean([one == other for one, other in zip(texts["device"], texts["host"], strict=True)])
    return {
        "tokens_s": {way: 1 / float(np.median(taken[1:])) for way, taken in seconds.items()},
        "known": counted.known / counted.asked if counted.asked else 1.0,
        "same_answers": float(same),
    }


@contextmanager
def _drawing(session: GenerationSession, way: str) -> Iterator[None]:
    """Let the host draw, or nothing."""
    graph: Any = session._engine._graph
    drawer = getattr(graph, "_drawer", None)
    if way == "host":
        for bound in graph._bound.values():
            bound.step._drawer = None
        graph._drawer = None
    try:
        yield
    finally:
        graph._drawer = drawer
        for bound in graph._bound.values():
            bound.step._drawer = drawer


def _requests(
    session: GenerationSession,
    folder: Path,
    name: str,
    rows: int,
    new: int,
    sampled: Mapping[str, Any],
    temperature: float,
) -> list[GenerationRequest]:
    random = np.random.default_rng(5)
    customers = sorted(file.stem for file in (folder / "customers").glob("*.safetensors"))
    vocabulary = SHAPES[name].config["vocab_size"]
    settings = dict(sampled) | {"temperature": sampled.get("temperature", 0.0) * temperature}
    return [
        GenerationRequest(
            [int(token) for token in random.integers(10, vocabulary, 24)],
            customers[row % len(customers)],
            Sampling(seed=row, **settings),
            max_tokens=new,
            ignore_end=True,
        )
        for row in range(rows)
    ]


def _spread(base: Path, vocabulary: int) -> float:
    """The standard deviation of logits, by PyTorch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        return float(model(torch.arange(20, min(52, vocabulary))[None]).logits.std())
