"""Text that goes on from a text: answers of a decoder, learned token by token."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.tasks.base import IGNORED, Answer, NewHead, Task
from qrlora_deploy.tokenization.words import LocatedWords

if TYPE_CHECKING:
    import torch

    from qrlora_deploy.data.examples import Examples

NLL, RIGHT = 0, 1
"""Columns of what `CausalLM.graded` gives: the negative log likelihood of a token, and whether it is the likeliest."""


class CausalLM(Task):
    """A decoder writes the next token; data are prompts with completions, or chats.

    The head is the decoder's own and stays. Only tokens of answers count: those of prompts, and of all turns of a chat
    but the assistant's, have the target `IGNORED`.
    """

    name = "text-generation"
    option = "causal-lm"
    problem_type = None
    model_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    peft_type = "CAUSAL_LM"
    output_shape = ("batch", "vocabulary")
    has_labels = False
    names_outputs = False
    writes_text = True
    metrics = ("nll", "exact_match", "token_accuracy")
    lower_is_better = frozenset({"nll"})
    signal = "token_accuracy"
    has_accuracy = False
    rate_factor = 3.0

    @property
    def config_fields(self) -> dict[str, str | None]:
        """Nothing: the model's class says it."""
        return {}

    def recognise(self, examples: "Examples") -> str | None:
        """The rows are prompts with completions, or chats: as `Task.recognise`."""
        return None if examples.turns is None else ""

    def new_head(self, examples: "Examples") -> NewHead:
        """There is none: always an InputError."""
        raise InputError(
            f"{examples.name} holds texts to write, and a decoder keeps its own head: train it without warmup and "
            f"without {argument('head')}"
        )

    def unknown(self, examples: "Examples", names: Sequence[str]) -> list[str]:
        """None: nothing is named."""
        return []

    def encode(self, examples: "Examples", names: Sequence[str]) -> list[None]:
        """Nothing a row, as `Task.encode`: targets are the tokens themselves, which `build_rows` makes."""
        self.check_rows(examples)
        return [None] * len(examples)

    def graded(self, model: Any, batch: Mapping[str, "torch.Tensor"], targets: "torch.Tensor") -> "torch.Tensor":
        """How likely each target is, `[n, tokens, 2]` fp32 by `NLL` and `RIGHT`, with a gradient; 0 elsewhere.

        The head is run where a target follows, not on prompts: its logits are the largest part of a step.

        Args:
            model: a decoder.
            batch: `input_ids [n, tokens]` and what goes with them.
            targets: `[n, tokens]` int64, the token itself or `IGNORED`; that of a row's first token is not looked at.
        """
        import torch
        from torch.nn import functional

        following = targets[:, 1:]
        wanted = following != IGNORED
        places = wanted.any(0).nonzero()[:, 0]
        logits = _logits_at(model, batch, places)
        wanted, chosen = wanted[:, places], following[:, places]
        losses = functional.cross_entropy(logits[wanted].float(), chosen[wanted], reduction="none")
        right = logits[wanted].argmax(-1) == chosen[wanted]
        found = torch.zeros(*targets.shape, 2, device=targets.device)
        rows, columns = wanted.nonzero(as_tuple=True)
        return found.index_put((rows, places[columns] + 1), torch.stack([losses, right.to(losses)], 1))

    def loss(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The mean negative log likelihood of the targets, of what `graded` gave: as transformers' own forward."""
        return logits[..., NLL].sum() / (targets[:, 1:] != IGNORED).sum().clamp(min=1)

    def row_sums(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """`[n, 3]` fp32 of what `graded` gave: a row's sum of `nll`, how many targets it has, how many are right."""
        import torch

        counts = (targets[:, 1:] != IGNORED).sum(1)
        return torch.stack([logits[..., NLL].sum(1), counts.to(logits), logits[..., RIGHT].sum(1)], 1)

    def row_losses(self, logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """The sum of each row's losses, of `row_sums`; over the targets of all of a customer's rows it is `loss`."""
        return logits[:, 0]

    def score_each(
        self, owners: np.ndarray, decisive: np.ndarray, targets: np.ndarray, customers: int
    ) -> list[dict[str, float]]:
        """As `Task.score_each`, of `row_sums`."""
        found = []
        for customer in range(customers):
            own = decisive[owners == customer].astype(np.float64)
            nll, count, right = own.sum(0)
            exact = float((own[:, 1] == own[:, 2]).mean())
            found.append(dict(zip(self.metrics, (nll / max(count, 1), exact, right / max(count, 1)), strict=True)))
        return [{name: float(value) for name, value in each.items()} for each in found]

    def score(self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
        """`nll` a token, the share of rows whose every target is the likeliest token, and the share of such tokens.

        A row matches exactly where greedy writing gives its answers to the last token, the end of text included: each
        token is the likeliest one behind the right ones before it.

        Args:
            logits: `[n, tokens, 2]`, from `graded`.
            targets: `[n, tokens]`.
        """
        present = np.array(targets) != IGNORED
        present[:, 0] = False
        right = (np.asarray(logits)[..., RIGHT] > 0.5) & present
        count = max(int(present.sum()), 1)
        return {
            "nll": float(np.asarray(logits, dtype=np.float64)[..., NLL][present].sum() / count),
            "exact_match": float((right | ~present).all(axis=1).mean()),
            "token_accuracy": float(right.sum() / count),
        }

    def says_nothing(self, metrics: Mapping[str, float]) -> bool:
        """Never: an answer in other words is an answer."""
        return False

    def answer(self, logits: np.ndarray, names: Sequence[str], words: LocatedWords | None = None) -> Answer:
        """There are no names to answer with.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{self.name} answers with text")

    def agreement(self, logits: np.ndarray, others: np.ndarray) -> np.ndarray:
        """1 where the likeliest token is the same one."""
        return (np.asarray(logits).argmax(axis=-1) == np.asarray(others).argmax(axis=-1)).astype(np.float64)


def _logits_at(model: Any, batch: Mapping[str, "torch.Tensor"], places: "torch.Tensor") -> "torch.Tensor":
    """Logits `[n, places, vocabulary]`; a family that computes them of all tokens alone is asked for all."""
    kept = {"logits_to_keep": places} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: torch.Tensor = model(**batch, use_cache=False, **kept).logits
    return logits if kept else logits[:, places]
