"""Text in, labels out, from a bundle alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.runtime.bundle import TOKENIZER_FILE, Bundle
from qrlora_deploy.runtime.session import open_session


@dataclass(frozen=True)
class Prediction:
    """The answer for one text.

    Attributes:
        label: the most likely label; for a regression the name of its output.
        score: its probability; for a regression the value itself.
        logits: what the model gave.
    """

    label: str
    score: float
    logits: tuple[float, ...]


class Predictor:
    """A bundle made ready to answer.

    Args:
        bundle: an open bundle.
        provider: "cpu", "cuda" or "tensorrt".
        threads: threads within an operator.

    Raises:
        ProviderError: the provider does not load. FileFormatError: the tokenizer or model cannot be opened.
    """

    def __init__(self, bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> None:
        self.bundle = bundle
        self.tokenizer = _open_tokenizer(bundle)
        self.session = open_session(bundle.model, provider, threads)

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, batch_size: int = 32
    ) -> list[Prediction]:
        """Answer every text, in the order given.

        Args:
            texts: the texts, or the first ones of the pairs.
            pairs: the second texts, one per text.
            batch_size: rows per run. Texts of similar length share a batch, so little is padded.

        Raises:
            InputError: the numbers of texts and pairs differ, or the batch size is not positive.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise InputError(f"there are {len(texts)} texts but {len(pairs)} second texts")
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {batch_size}")
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]) + len(pairs[index] if pairs else ""))
        found: dict[int, Prediction] = {}
        for rows in _batches(order, batch_size):
            logits = self._logits([(texts[row], pairs[row]) if pairs else texts[row] for row in rows])
            found.update((row, self._prediction(values)) for row, values in zip(rows, logits, strict=True))
        return [found[index] for index in range(len(texts))]

    def _logits(self, batch: list[Any]) -> np.ndarray:
        encodings = self.tokenizer.encode_batch(batch)
        columns = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
        }
        names = [record.name for record in self.bundle.manifest.inputs]
        inputs = {name: np.array(columns[name], dtype=np.int64) for name in names}
        return np.asarray(self.session.run(["logits"], inputs)[0])

    def _prediction(self, logits: np.ndarray) -> Prediction:
        manifest = self.bundle.manifest
        values = tuple(float(value) for value in logits)
        if manifest.task == "text-regression":
            return Prediction(manifest.labels[0], values[0], values)
        odds = np.exp(logits.astype(np.float64) - logits.max())
        best = int(logits.argmax())
        return Prediction(manifest.labels[best], float(odds[best] / odds.sum()), values)


def _open_tokenizer(bundle: Bundle) -> Any:
    manifest = bundle.manifest
    path = bundle.folder / TOKENIZER_FILE
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # The library raises plain `Exception`.
    except Exception as error:
        raise FileFormatError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.enable_truncation(manifest.max_length)
    tokenizer.enable_padding(
        direction=manifest.padding_side,
        pad_id=manifest.pad_token_id,
        pad_type_id=manifest.pad_token_type_id,
        pad_token=tokenizer.id_to_token(manifest.pad_token_id) or "[PAD]",
    )
    return tokenizer


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
