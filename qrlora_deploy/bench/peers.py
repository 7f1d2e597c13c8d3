"""Peers in PyTorch: the plain base, eager or compiled, and PEFT's mixed batches. Imports PyTorch when opened."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qrlora_deploy.bench.report_parts import Kind
from qrlora_deploy.bench.report_parts import Subject as SubjectRecord
from qrlora_deploy.bench.subjects import Call, Spec, folder_bytes
from qrlora_deploy.bench.workload import Workload, token_inputs
from qrlora_deploy.data.cutting import cut_texts
from qrlora_deploy.errors import InputError, ProviderError, argument, first_line
from qrlora_deploy.installation.parts import need
from qrlora_deploy.io.files import digest_file

KINDS: dict[str, Kind] = {"torch-eager": "torch-eager", "torch-compile": "torch-compile", "peft": "peft"}

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names of PyTorch's dtypes."""

MAX_TOKENS = 2**20
LORA_RANK = 8
LORA_ADAPTERS = 8


class TorchSubject:
    """A Hugging Face classifier in PyTorch, in the first bundle's precision, TF32 off.

    With PEFT it has LoRA adapters of rank 8, in turn by row. The adapters have random numbers: their
    speed does not depend on them.

    Raises:
        InputError: PEFT is missing, or the base cannot be opened.
        MissingPartError: PyTorch is missing.
        ProviderError: PyTorch has no such device.
    """

    def __init__(self, spec: Spec) -> None:
        need("train", argument("peers", [spec.kind]), ["torch", "transformers"])
        import torch

        from qrlora_deploy.models.checkpoint import open_checkpoint

        if spec.provider == "tensorrt":
            raise ProviderError(f"{argument('peers', [spec.kind])} runs on cpu and cuda, not on tensorrt")
        if spec.provider == "cuda" and not torch.cuda.is_available():
            raise ProviderError(
                f"{argument('peers', [spec.kind])}: PyTorch finds no CUDA device; pass {argument('provider', 'cpu')}"
            )
        self.spec, self._torch = spec, torch
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            checkpoint = open_checkpoint(str(spec.path))
            checkpoint.require_task_head()
            self._tokenizer, model = checkpoint.tokenizer(), checkpoint.load_model()
        except InputError as error:
            raise InputError(f"{argument('base')} {spec.path} cannot be opened: {error}") from error
        self._vocabulary = int(model.config.vocab_size)
        self._adapters: list[str] = []
        if spec.kind == "peft":
            model = self._with_adapters(model)
        self._model = model.eval().to(spec.provider, getattr(torch, DTYPES[spec.precision]))
        if spec.kind == "torch-compile":
            mode = "reduce-overhead" if spec.provider == "cuda" else None
            self._model = torch.compile(self._model, mode=mode)
        self.record = self._describe()

    def prepare(self, workload: Workload) -> Call:
        """As `Subject.prepare`. Inputs and logits go through the host's memory, as with a bundle."""
        batches = self._inputs(workload)
        names = [self._adapters[row % len(self._adapters)] for row in range(workload.batch)] if self._adapters else []
        more: dict[str, Any] = {"adapter_names": names} if names else {}
        torch, device = self._torch, self.spec.provider

        def call(turn: int) -> np.ndarray:
            with torch.inference_mode():
                arrays = batches[turn % len(batches)]
                tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
                logits: np.ndarray = self._model(**tensors, **more).logits.float().cpu().numpy()
            return logits

        return call

    def _with_adapters(self, model: Any) -> Any:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise InputError(
                f"{argument('peers', ['peft'])} needs PEFT: {first_line(error)}; pip install peft"
            ) from error
        config = LoraConfig(r=LORA_RANK, target_modules=list(self.spec.targets), init_lora_weights=False)
        self._adapters = [f"customer_{index}" for index in range(LORA_ADAPTERS)]
        wrapped = get_peft_model(model, config, adapter_name=self._adapters[0])
        for name in self._adapters[1:]:
            wrapped.add_adapter(name, config)
        return wrapped

    def _inputs(self, workload: Workload) -> list[dict[str, np.ndarray]]:
        names = self._tokenizer.model_input_names
        if workload.length is not None:
            return [token_inputs(workload, names, self._vocabulary, self._tokenizer.pad_token_id or 0)]
        seconds: Sequence[tuple[str, ...] | None] = workload.pairs or [None] * len(workload.texts)
        # One without a limit of its own does not truncate.
        limit = min(self._tokenizer.model_max_length, MAX_TOKENS)
        cut = [
            cut_texts(self._tokenizer, texts, pair, limit) for texts, pair in zip(workload.texts, seconds, strict=True)
        ]
        encoded = [self._tokenizer(*batch, padding=True, truncation=True, return_tensors="np") for batch in cut]
        return [{name: np.asarray(batch[name], dtype=np.int64) for name in names} for batch in encoded]

    def _describe(self) -> SubjectRecord:
        options = {"threads": str(self._torch.get_num_threads())}
        if self._adapters:
            options["adapters"] = f"{len(self._adapters)} LoRA of rank {LORA_RANK}, different in each row"
        return SubjectRecord(
            name=self.spec.name,
            role="peer",
            kind=KINDS[self.spec.kind],
            path=str(self.spec.path),
            digest=_digest(self.spec.path),
            precision=self.spec.precision,
            provider=f"torch {self.spec.provider}",
            options=options,
            size_bytes=folder_bytes(self.spec.path),
        )


def _digest(folder: Path) -> str:
    """SHA-256 over the digests of the weights' files, in the order of their names."""
    found = [digest_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(found).encode()).hexdigest()
