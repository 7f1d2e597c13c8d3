"""Real text that comes with the project: part of CLINC150, by Larson and others, CC BY 3.0.

Imports no PyTorch. The files are made by `benchmarks/make_quickstart_data.py`; LICENSE and
ATTRIBUTION.md lie beside them.
"""

from pathlib import Path

from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.data.turns import COMPLETION, PROMPT, Turn

FOLDER = Path(__file__).parent / "clinc150"
GENERAL = "general.tsv"

CUSTOMERS = ("banking", "kitchen_and_dining", "home")
"""Domains that play the customers: 15 intents each, some 1,500 rows to train on, 450 held out. They
were chosen among the ten because the warmed-up base leaves room there, 75 to 84 % of the held-out
text answered rightly; in the domain travel, for one, there is little left to learn."""

SAMPLES = 64
STRIDE = 27
"""Odd, so that steps of it visit each of the 64 samples once; the first few differ much in length."""


def general_file() -> Path:
    """A sample of all 150 intents, to warm up a base that all customers share."""
    return FOLDER / GENERAL


def train_file(customer: str) -> Path:
    """The rows that one of `CUSTOMERS` trains on."""
    return FOLDER / f"{customer}.train.tsv"


def held_out_file(customer: str) -> Path:
    """The rows that one of `CUSTOMERS` is scored on; in no other file."""
    return FOLDER / f"{customer}.test.tsv"


def general_examples() -> Examples:
    """The rows of `general_file`."""
    return read_examples(general_file())


def train_examples(customer: str) -> Examples:
    """The rows of `train_file`."""
    return read_examples(train_file(customer))


def held_out_examples(customer: str) -> Examples:
    """The rows of `held_out_file`."""
    return read_examples(held_out_file(customer))


def sample_texts() -> list[str]:
    """64 texts of different lengths, from the shortest to the longest, well mixed.

    The same ones in the same order on every call.
    """
    texts = sorted(set(general_examples().texts), key=lambda text: (len(text), text))
    spread = [texts[index * (len(texts) - 1) // (SAMPLES - 1)] for index in range(SAMPLES)]
    return [spread[index * STRIDE % SAMPLES] for index in range(SAMPLES)]


def as_prompts(examples: Examples) -> Examples:
    """The same rows for a decoder: a request, and the words of its label as the completion."""
    turns = [
        (Turn(PROMPT, f"Request: {text}\nIntent:"), Turn(COMPLETION, " " + str(label).replace("_", " ")))
        for text, label in zip(examples.texts, examples.labels, strict=True)
    ]
    return Examples([""] * len(turns), None, [""] * len(turns), examples.name, turns=turns)
