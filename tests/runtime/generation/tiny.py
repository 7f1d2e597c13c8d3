"""An engine on a small random decoder, with customers whose rows are made here, and PyTorch's own answers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnxruntime

from qrlora_deploy.errors import UnknownCustomerError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.runtime.bundle.row_layout import TABLE, TableLayout
from qrlora_deploy.runtime.generation.budget import Budget
from qrlora_deploy.runtime.generation.cache import KvCache
from qrlora_deploy.runtime.generation.engine import Engine, Running
from qrlora_deploy.runtime.generation.graph import DecoderGraph
from qrlora_deploy.runtime.generation.holding import Held
from qrlora_deploy.runtime.generation.placement import batch_buckets
from qrlora_deploy.runtime.generation.prefixes import PrefixCache
from qrlora_deploy.runtime.generation.requests import GenerationAnswer
from qrlora_deploy.runtime.generation.sampling import Sampling
from qrlora_deploy.runtime.generation.scheduler import Scheduler
from qrlora_deploy.runtime.generation.writing import Writer
from qrlora_deploy.runtime.table.memory import HostMemory, TableMemory

if TYPE_CHECKING:
    from qrlora_deploy.models.checkpoint import Checkpoint

NAMES = ("one", "two", "three")


@dataclass(frozen=True)
class Made:
    """A decoder and its customers.

    Attributes:
        values: `[4, total_rank]`: the base's zeros and those of `NAMES`.
    """

    checkpoint: "Checkpoint"
    basis: Basis
    values: np.ndarray
    model: Path

    def number(self, customer: str | None) -> int:
        """The row of a customer."""
        return 0 if customer is None else 1 + NAMES.index(customer)

    def by_torch(self, prompt: list[int], customer: str | None, new: int) -> list[int]:
        """The greedy answer of transformers' own `generate`, with the project's side branches in the model."""
        import torch
        from transformers import AutoModelForCausalLM

        from qrlora_deploy.models.adapter import insert, set_coefficients

        model = AutoModelForCausalLM.from_pretrained(self.checkpoint.folder, dtype=torch.float32)
        set_coefficients(insert(model.eval(), self.basis), self.basis, self.values[self.number(customer)])
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=[],
                pad_token_id=0,
            )
        whole: list[int] = found[0].tolist()
        return whole[len(prompt) :]

    def forced(self, prompt: list[int], customer: str | None, answer: list[int]) -> np.ndarray:
        """Logits `[tokens, vocabulary]` of transformers' own forward before each token of an answer."""
        import torch
        from transformers import AutoModelForCausalLM

        from qrlora_deploy.models.adapter import insert, set_coefficients

        model = AutoModelForCausalLM.from_pretrained(self.checkpoint.folder, dtype=torch.float32)
        set_coefficients(insert(model.eval(), self.basis), self.basis, self.values[self.number(customer)])
        with torch.no_grad():
            found: np.ndarray = model(torch.tensor([prompt + answer])).logits[0].numpy()
        return found[len(prompt) - 1 : -1]


def make_decoder(folder: Path, family: str = "Llama", **changes: Any) -> Made:
    """A decoder in `folder`."""
    from tests.decoders import make_basis, make_customers, save_tiny, write_tiny

    checkpoint = save_tiny(folder / "base", family, **changes)
    basis = make_basis(checkpoint)
    return Made(
        checkpoint, basis, make_customers(basis, 1 + len(NAMES)), write_tiny(folder / "bundle", checkpoint, basis)
    )


class Holders:
    """Customers in a table that does not change; counts what is held."""

    def __init__(self, made: Made) -> None:
        layout = TableLayout(list(made.basis.ranks.values()))
        self._made, self.held = made, 0
        self.memory = TableMemory({TABLE: HostMemory(len(made.values), layout.width)})
        self.memory.write_rows(0, {TABLE: np.stack([layout.row(values) for values in made.values])})

    def hold(self, customer: str | None) -> Held:
        if customer is not None and customer not in NAMES:
            raise UnknownCustomerError(f"no customer is called {customer!r}")
        self.held += 1
        number = self._made.number(customer)
        return Held(number, f"digest {customer}" if customer else "", bytes([number]))

    def release(self, held: Held) -> None:
        self.held -= 1


@dataclass
class Desk:
    """An engine, and what was asked of it."""

    made: Made
    max_rows: int = 4
    batches: tuple[int, ...] | None = None
    capacities: tuple[int, ...] = (64,)
    max_bytes: int = 2**24
    block: int = 8
    now: float = 0.0
    asked: list[Running] = field(default_factory=list)

    stays: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.graph = self.open_graph()
        self.budget = Budget(self.max_bytes)
        self.prefixes = PrefixCache(self.budget, self.max_bytes // 4, self.block)
        self.holders = self.open_holders()
        self.scheduler = Scheduler(
            self.capacities,
            batch_buckets(self.max_rows, self.batches),
            self.budget,
            self.open_cache,
            spare=self.prefixes.free,
            stays=self.stays,
        )
        self.engine = Engine(
            self.graph,
            self.scheduler,
            self.prefixes,
            self.holders,  # type: ignore[arg-type]
            "base digest",
            self.block,
            2 * self.block,
            lambda: self.now,
        )
        self.tokenizer = _NoText()

    def open_graph(self) -> DecoderGraph:
        """The decoder."""
        return DecoderGraph(onnxruntime.InferenceSession(self.made.model))

    def open_cache(self, capacity: int) -> Any:
        """Rows of a capacity."""
        return KvCache(self.graph.cache_shape, capacity)

    def open_holders(self) -> Holders:
        """The customers."""
        return Holders(self.made)

    def ask(
        self,
        prompt: list[int],
        customer: str | None = None,
        new: int = 8,
        deadline: float | None = None,
        **sampling: Any,
    ) -> Running:
        """Take a request."""
        writer = Writer(self.tokenizer, prompt, (), Sampling(**sampling), (), new)
        running = Running(len(self.asked), prompt, customer, len(prompt) + new, writer, deadline)
        self.asked.append(running)
        self.engine.arrive(running)
        return running

    def finish(self) -> None:
        """Step until nothing is left to do."""
        while not self.engine.idle:
            self.engine.step()

    def alone(self, prompt: list[int], customer: str | None = None, new: int = 8, **sampling: Any) -> GenerationAnswer:
        """The answer where nothing else is asked."""
        running = self.ask(prompt, customer, new, **sampling)
        self.finish()
        return answer_of(running)


def answer_of(running: Running) -> GenerationAnswer:
    """The answer of a request that has ended."""
    answer = running.events[-1].answer
    assert answer is not None
    return answer


class _NoText:
    """A tokenizer where only ids matter."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return ""


def prompt_of(seed: int, length: int, vocabulary: int = 100) -> list[int]:
    """Random ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(4, vocabulary, length)]
