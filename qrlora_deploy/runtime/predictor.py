"""Text in, labels out, from a bundle alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.bucket_runner import make_runner
from qrlora_deploy.runtime.buckets import Buckets
from qrlora_deploy.runtime.bundle import Bundle, check_graph
from qrlora_deploy.runtime.devices import Device
from qrlora_deploy.runtime.session import open_session
from qrlora_deploy.runtime.switchable import SwitchableSession
from qrlora_deploy.runtime.tokenizing import TextEncoder, batches


@dataclass(frozen=True)
class Prediction:
    """The answer for one text.

    Attributes:
        label: the most likely label; for a regression the name of its output.
        score: its probability; for a regression the value itself.
        logits: what the model gave, one per label of the customer.
    """

    label: str
    score: float
    logits: tuple[float, ...]


class Predictor:
    """A bundle made ready to answer.

    Args:
        bundle: an open bundle, merged or switchable.
        provider: "cpu", "cuda", "cuda:1" or "tensorrt", or a `Device` with options of its own.
        threads: threads within an operator.
        buckets: run in these shapes only; on CUDA as captured graphs.
        session: the customers of a switchable bundle; opened with defaults, and without any
            customer, if None.

    Attributes:
        switchable: the session that customers are loaded into; None for a merged bundle.

    Raises:
        ProviderError: the provider does not load. FileFormatError: the tokenizer or model cannot be opened.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str | Device = "cpu",
        threads: int | None = None,
        buckets: Buckets | None = None,
        session: SwitchableSession | None = None,
    ) -> None:
        self.bundle = bundle
        self.encoder = TextEncoder(bundle)
        self.switchable = session
        if bundle.manifest.kind == "merged":
            opened = open_session(bundle.model, provider, threads, cuda_graph=buckets is not None)
            check_graph(opened, bundle)
            self._merged = make_runner(opened, bundle.manifest, provider, buckets)
        elif session is None:
            self.switchable = SwitchableSession(bundle, provider, threads=threads, buckets=buckets)

    def predict(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        batch_size: int = 32,
        customers: Sequence[str | None] | None = None,
    ) -> list[Prediction]:
        """Answer every text, in the order given.

        Args:
            texts: the texts, or the first ones of the pairs.
            pairs: the second texts, one per text.
            batch_size: rows per run. Texts of similar length share a batch, so little is padded.
            customers: of a switchable bundle, one per text, None being the base; all base if None.

        Raises:
            InputError: the numbers of texts, pairs and customers differ, the batch size is not
                positive, or a customer is not there.
            QrloraError: the model fails.
        """
        owners: Sequence[str | None] = [None] * len(texts) if customers is None else customers
        if len(owners) != len(texts):
            raise InputError(f"there are {len(texts)} texts but {len(owners)} customers")
        found: dict[int, Prediction] = {}
        for rows in batches(texts, pairs, batch_size):
            inputs = self.encoder.encode([texts[row] for row in rows], [pairs[row] for row in rows] if pairs else None)
            logits, labels = self._answer(inputs, [owners[row] for row in rows])
            found.update((row, self._prediction(*answer)) for row, *answer in zip(rows, logits, labels, strict=True))
        return [found[index] for index in range(len(texts))]

    def _answer(
        self, inputs: dict[str, np.ndarray], owners: Sequence[str | None]
    ) -> tuple[np.ndarray, Sequence[tuple[str, ...]]]:
        if self.switchable is not None:
            return self.switchable.predict(inputs, owners)
        if any(owner is not None for owner in owners):
            raise InputError(f"{self.bundle.folder} is a merged bundle: it holds one customer, who has no name in it")
        return self._merged.run(inputs), [self.bundle.manifest.labels] * len(owners)

    def _prediction(self, logits: np.ndarray, labels: tuple[str, ...]) -> Prediction:
        # Behind its own labels a customer has -inf.
        own = logits[: len(labels)]
        values = tuple(float(value) for value in own)
        if self.bundle.manifest.task == "text-regression":
            return Prediction(labels[0], values[0], values)
        odds = np.exp(own.astype(np.float64) - own.max())
        best = int(own.argmax())
        return Prediction(labels[best], float(odds[best] / odds.sum()), values)
