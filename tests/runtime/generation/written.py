"""A whole bundle of a small decoder, and a folder of its customers."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.runtime.generation.tiny import NAMES, Made, make_decoder

END = 3
"""The end token of the tiny decoders."""


@dataclass(frozen=True)
class Written:
    """Files of a decoder.

    Attributes:
        bundle: switchable.
        customers: a folder with a file for each of `NAMES`.
    """

    made: Made
    bundle: Path
    customers: Path

    def coefficients(self, values: np.ndarray, **changes: Any) -> Coefficients:
        """A customer of the decoder."""
        checkpoint, basis = self.made.checkpoint, self.made.basis
        settings = {"basis_digest": basis.digest, "base_name": checkpoint.name, "base_digest": checkpoint.digest}
        return Coefficients(values, task=checkpoint.task, labels=(), **(settings | changes))

    def customer(self, name: str) -> Coefficients:
        """One of `NAMES`."""
        return self.coefficients(self.made.values[self.made.number(name)])

    def copied(self, folder: Path) -> Path:
        """A folder of customers that may be changed."""
        return Path(shutil.copytree(self.customers, folder))

    def greedy(self, prompt: str, customer: str | None, new: int) -> str:
        """The text of PyTorch's greedy answer to a text, up to the end token."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.bundle / "tokenizer.json"))
        tokenizer.no_padding()
        tokens = self.made.by_torch(tokenizer.encode(prompt).ids, customer, new)
        return str(tokenizer.decode(tokens[: tokens.index(END)] if END in tokens else tokens))


def write_everything(folder: Path) -> Written:
    """A bundle and its customers in `folder`."""
    from tests.decoders import SIZES, save_bundle

    assert SIZES["eos_token_id"] == END
    made = make_decoder(folder)
    bundle = save_bundle(folder / "switchable", made.checkpoint, made.basis)
    written = Written(made, bundle, folder / "customers")
    written.customers.mkdir()
    for name in NAMES:
        write_coefficients(written.customer(name), written.customers / f"{name}.safetensors")
    return written
