"""One shape with its graphs, checked, and its PyTorch model; and how contenders take turns."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.common.measuring import summary
from benchmarks.decoding.checking import check
from benchmarks.decoding.graphs import Made, Writer, open_graph, write_graph
from benchmarks.decoding.shapes import SHAPES, TARGETS, make_basis, make_customers, save_model

CUSTOMERS = 65
"""In the table of a graph; the first one is the base."""

FLOOR_BYTES_S = {"H200": 4.3e12}
H100_BYTES_S = 3.0e12
"""At which a card reads its memory, by what its name holds, and an H100; the floor is the time of all weights once."""


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        batches: rows, in the order in which they are run.
        prompt: tokens. new: tokens that are written.
        compiled: batches for which torch.compile is run, a minute each.
        deadline: of `time.perf_counter`; what is slow and begins later is left out. None: there is none.
    """

    device: str
    rounds: int
    batches: tuple[int, ...]
    prompt: int
    new: int
    compiled: tuple[int, ...]
    deadline: float | None

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return self.deadline is None or time.perf_counter() + seconds < self.deadline


class Timed(Protocol):
    """What can be timed."""

    def timed(self, ids: torch.Tensor) -> tuple[float, float]:
        """Seconds of reading the prompts, and of each token that was written."""


@dataclass
class Bench:
    """A shape, ready to be timed.

    Attributes:
        graphs: by the names of `TARGETS`, with their sessions.
        customers: `[customers, total_rank]` of each graph.
        checks: what each graph was off by.
        model: of transformers, in the graphs' precision.
    """

    name: str
    settings: Settings
    graphs: dict[str, Made]
    sessions: dict[str, Any]
    checks: dict[str, Any]
    model: Any
    weight_bytes: int
    numbers: Any = field(default_factory=lambda: count(1000))

    @property
    def layers(self) -> int:
        """Blocks of the decoder."""
        return int(self.model.config.num_hidden_layers)

    @property
    def floor_ms(self) -> float:
        """Milliseconds in which the card reads all weights once; an H100 where it is not known."""
        name = torch.cuda.get_device_name() if self.settings.device == "cuda" else ""
        speed = next((found for card, found in FLOOR_BYTES_S.items() if card in name), H100_BYTES_S)
        return self.weight_bytes / speed * 1e3

    def ids(self, rows: int) -> torch.Tensor:
        """`[rows, prompt]`, seeded."""
        random = torch.Generator().manual_seed(11)
        found = torch.randint(3, self.model.config.vocab_size, (rows, self.settings.prompt), generator=random)
        return found.to(self.settings.device)

    def writer(self, name: str, rows: int, table: torch.Tensor | None = None) -> Writer:
        """Rows of a graph, another customer in each as far as there are any.

        Args:
            table: another one than the graph's own; its customers are drawn.
        """
        own = self.graphs[name].table
        settings = self.settings
        slots = torch.arange(rows) % (CUSTOMERS - 1) + 1
        if table is not None:
            slots = torch.randint(0, len(table), (rows,), generator=torch.Generator().manual_seed(6))
        return Writer(
            self.sessions[name],
            settings.device,
            rows,
            settings.prompt,
            settings.new,
            own if table is None else table,
            slots.to(settings.device),
            number=next(self.numbers),
        )


def prepare(folder: Path, name: str, settings: Settings) -> Bench:
    """Write a model and its graphs, open them, and hold each against PyTorch in fp32.

    Raises:
        CheckError: a graph answers something else.
    """
    shape, device = SHAPES[name], settings.device
    dtype, precision = (torch.float16, "fp16") if device == "cuda" else (torch.float32, "fp32")
    checkpoint = save_model(folder / "base", shape, dtype, device)
    model: Any = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, trust_remote_code=False)
    model = model.to(device).eval()
    graphs: dict[str, Made] = {}
    sessions, checks = {}, {}
    for graph, targets in TARGETS.items():
        basis = make_basis(checkpoint, shape, targets)
        customers = make_customers(basis, CUSTOMERS)
        made = write_graph(folder / graph, graph, checkpoint, basis, customers, device)
        sessions[graph] = open_graph(made, device)
        number = len(graphs) + 1
        checks[graph] = check(made, sessions[graph], model, customers, device, precision, settings.prompt, number)
        graphs[graph] = made
        print(f"{name}, {graph}: {made.operators} operators, {checks[graph]}", flush=True)
    weights = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    return Bench(name, settings, graphs, sessions, checks, model.to(dtype), weights)


def in_rounds(contenders: Mapping[str, Timed], ids: torch.Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of reading and of a token: rounds in which every contender has its turn, in a random order."""
    random = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.permutation(list(contenders)):
            found[name].append(contenders[name].timed(ids))
    return {
        name: {"read_ms": summary([one for one, _ in times]), "token_ms": summary([one for _, one in times])}
        for name, times in found.items()
    }


def token_ms(results: Mapping[str, Any], name: str) -> float | None:
    """The median of a contender; None: it did not run."""
    return float(results[name]["token_ms"]["p50"]) if name in results else None
