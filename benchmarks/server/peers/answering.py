"""What stands behind each of the other servers: the product's own session, or PEFT's mixed batch.

A server's process is told by the variable `PEER`, since some of them make their model by its import path alone.
"""

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from benchmarks.server.load import name_of

VARIABLE = "PEER"

Answers = tuple[list[str], list[float]]
"""The label of each text and its score."""


@dataclass(frozen=True)
class Behind:
    """What a server's process is to put behind it.

    Attributes:
        kind: "session" or "peft".
        folder: of `base`, `basis.safetensors`, `bundle` and the packed files.
        customers: of the packed file; of PEFT so many adapters.
        device: "cpu" or "cuda".
        precision: "fp32" or "fp16".
        rows: of a batch at most, where the server makes batches.
        wait_ms: a batch may wait so long for more, where the server makes batches.
    """

    kind: str
    folder: str
    customers: int
    device: str = "cpu"
    precision: str = "fp32"
    rows: int = 64
    wait_ms: float = 2.0

    @classmethod
    def told(cls) -> Self:
        """As the process was told."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def variables(self) -> dict[str, str]:
        """For a process that is to be told."""
        return {VARIABLE: json.dumps(asdict(self))}

    def open(self) -> "Answerer":
        """The model, with its customers."""
        return SessionAnswerer(self) if self.kind == "session" else PeftAnswerer(self)


class Answerer(Protocol):
    """Texts in, labels and scores out."""

    def answer(self, texts: Sequence[str], customers: Sequence[str]) -> Answers:
        """The answer of each text's customer."""


class SessionAnswerer:
    """The session that `serve` has, with the customers of a packed file."""

    def __init__(self, behind: Behind) -> None:
        from qrlora_deploy.runtime import Predictor, SwitchableSession, load_packed, open_bundle

        session = SwitchableSession(open_bundle(Path(behind.folder, "bundle")), behind.device)
        load_packed(session, Path(behind.folder, f"{behind.customers}.packed"))
        self._predictor = Predictor(session)

    def answer(self, texts: Sequence[str], customers: Sequence[str]) -> Answers:
        """All of them in one run."""
        found = self._predictor.predict(list(texts), customers=list(customers), batch_size=len(texts))
        return [one.label for one in found], [one.score for one in found]


class PeftAnswerer:
    """PEFT's mixed batch: LoRA of rank 8 on the layers that the session adapts, an adapter a customer.

    Attributes:
        loading_s: what adding the adapters took.
    """

    def __init__(self, behind: Behind) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        from qrlora_deploy.formats.basis import read_basis
        from qrlora_deploy.models.checkpoint import open_checkpoint
        from qrlora_deploy.runtime import open_bundle
        from qrlora_deploy.runtime.prediction.tokenizing import TextEncoder

        folder = Path(behind.folder)
        bundle = open_bundle(folder / "bundle")
        self._encoder, self._labels, self._device = TextEncoder(bundle), bundle.manifest.labels, behind.device
        targets = list(read_basis(folder / "basis.safetensors").ranks)
        config = LoraConfig(r=8, lora_alpha=32, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(0)
        begin = time.perf_counter()
        model: Any = get_peft_model(open_checkpoint(str(folder / "base")).load_model(), config, adapter_name=name_of(0))
        for number in range(1, behind.customers):
            model.add_adapter(name_of(number), config)
        self.loading_s = time.perf_counter() - begin
        self.model = model.eval().to(behind.device, {"fp32": torch.float32, "fp16": torch.float16}[behind.precision])
        # Its hooks that say which row has which adapter belong to the model, not to a call.
        self._lock = threading.Lock()

    def answer(self, texts: Sequence[str], customers: Sequence[str]) -> Answers:
        """All of them in one mixed batch."""
        return self._labelled(self._run(texts, adapter_names=list(customers)))

    def answer_alone(self, text: str, customer: str) -> Answers:
        """One text by its own adapter, which is made the active one: no mixed batch."""
        self.model.set_adapter(customer)
        return self._labelled(self._run([text]))

    def _run(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        import torch

        inputs = self._encoder.encode(list(texts), None, list(range(len(texts))))
        with self._lock, torch.inference_mode():
            tensors = {name: torch.from_numpy(values).to(self._device) for name, values in inputs.items()}
            logits: np.ndarray = self.model(**tensors, **options).logits.float().cpu().numpy()
        return logits

    def _labelled(self, logits: np.ndarray) -> Answers:
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [self._labels[index] for index in shares.argmax(axis=1)], [float(row.max()) for row in shares]
