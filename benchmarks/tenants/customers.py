"""The customers: which a basis is chosen on, which it is judged on, and their rows."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.glue.tasks import SAMPLE_SEED, Task, write_rows
from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.tasks.names import label_names

DOMAINS = (
    *("auto_and_commute", "banking", "credit_cards", "home", "kitchen_and_dining"),
    *("meta", "small_talk", "travel", "utility", "work"),
)
"""Of CLINC150; each is a customer with 15 intents."""

ALWAYS_CHOSEN_ON = ("banking77",)
ALWAYS_JUDGED_ON = ("snips", "atis", "trec", "ag_news")

POOL = "pool"
"""All that a basis is chosen on, as one customer, whose head knows all labels."""

TASK = Task("customer", "", ("accuracy",))


@dataclass(frozen=True)
class Split:
    """A division of the domains in halves, drawn by its number."""

    number: int

    @cached_property
    def _order(self) -> list[str]:
        return [DOMAINS[index] for index in np.random.default_rng(self.number).permutation(len(DOMAINS))]

    @property
    def chosen_on(self) -> tuple[str, ...]:
        """Five domains and banking77."""
        return (*self._order[:5], *ALWAYS_CHOSEN_ON)

    @property
    def judged_on(self) -> tuple[str, ...]:
        """The other five domains, and four customers of another kind."""
        return (*self._order[5:], *ALWAYS_JUDGED_ON)


@dataclass(frozen=True)
class Data:
    """Where the rows are, and how many are taken.

    Attributes:
        folder: with `clinc150/DOMAIN`, `banking77` and so on, each with train.tsv and test.tsv.
        train_rows: most training rows of a customer.
        test_rows: most test rows.
    """

    folder: Path
    train_rows: int
    test_rows: int

    def parts(self, customer: str) -> dict[str, Examples]:
        """The training and test rows of one customer, by the names that the loop has for them.

        Raises:
            InputError: they are not in the folder.
        """
        place = self.folder / (f"clinc150/{customer}" if customer in DOMAINS else customer)
        train, test = read_examples(place / "train.tsv"), read_examples(place / "test.tsv")
        return {"train": _sample(train, self.train_rows), "dev": _sample(test, self.test_rows)}

    def pooled(self, split: Split) -> list[Examples]:
        """The training rows of each customer that a basis is chosen on, with labels that none of them shares."""
        found = []
        for customer in split.chosen_on:
            part = self.parts(customer)["train"]
            found.append(replace(part, labels=[f"{customer}: {label}" for label in part.labels], name=customer))
        return found


def _sample(examples: Examples, most: int) -> Examples:
    if len(examples) <= most:
        return examples
    return examples.take(np.sort(np.random.default_rng(SAMPLE_SEED).permutation(len(examples))[:most]).tolist())


def together(parts: list[Examples]) -> Examples:
    """Rows of several customers as those of one."""
    texts = [text for part in parts for text in part.texts]
    return Examples(texts, None, [label for part in parts for label in part.labels], POOL)


def write_customer(data: Data, split: Split, customer: str, checkpoint: Checkpoint, path: Path, length: int) -> None:
    """The tokens of a customer, or of the pool; its labels are those of training and test rows.

    Raises:
        InputError: the data cannot be read.
    """
    if customer == POOL:
        pool = together(data.pooled(split))
        parts = {"train": pool, "dev": pool.take(range(0, len(pool), 8))}
    else:
        parts = data.parts(customer)
    names = label_names(str(label) for part in parts.values() for label in part.labels)
    write_rows(TASK, parts, names, checkpoint, path, length)
