"""PyTorch's ways to write tokens one by one: `generate`, a static cache captured as a CUDA graph, a compiled step; and
PEFT's batch of many customers."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.decoding.graphs import wait


class Generate:
    """transformers' `generate`: reading is what one token takes, writing the rest.

    Args:
        model: of transformers or PEFT.
        new: tokens that are written.
        clock: by which it is timed.
        options: of `generate`, such as PEFT's `adapter_names`.
    """

    def __init__(
        self, model: Any, device: str, new: int, clock: Callable[[], float] = time.perf_counter, **options: Any
    ) -> None:
        self._model, self._device, self.new, self._clock, self._options = model, device, new, clock, options

    def timed(self, ids: torch.Tensor) -> tuple[float, float]:
        """Seconds of reading the prompts, and of each token that was written."""
        reading = self._seconds(ids, 1)
        return reading, max(self._seconds(ids, self.new) - reading, 0.0) / (self.new - 1)

    def tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """`[rows, new]` that it writes."""
        with torch.no_grad():
            found: torch.Tensor = self._model.generate(**self._arguments(ids, self.new))
        return found[:, ids.shape[1] :]

    def _arguments(self, ids: torch.Tensor, new: int) -> dict[str, Any]:
        length = {"max_new_tokens": new, "min_new_tokens": new}
        mask = torch.ones_like(ids)
        return (
            {"input_ids": ids, "attention_mask": mask, "do_sample": False, "pad_token_id": 0} | length | self._options
        )

    def _seconds(self, ids: torch.Tensor, new: int) -> float:
        wait(self._device)
        start = self._clock()
        with torch.no_grad():
            self._model.generate(**self._arguments(ids, new))
        wait(self._device)
        return self._clock() - start


class Static:
    """A static cache; prompts are read eagerly, and a step ends with the likeliest token.

    Args:
        model: of transformers.
        compiled: by torch.compile with CUDA graphs; else the eager step is captured as one CUDA graph, where there is
            CUDA.
    """

    def __init__(self, model: Any, device: str, rows: int, prompt: int, new: int, compiled: bool) -> None:
        self._model, self._device, self._prompt, self.new = model, device, prompt, new
        self._cache = StaticCache(config=model.config, max_cache_len=prompt + new)
        self._position = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._held = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._compiled = compiled
        self._graph: torch.cuda.CUDAGraph | None = None
        mode = "reduce-overhead" if device == "cuda" else "default"
        self._step = torch.compile(self._plain, mode=mode, dynamic=False) if compiled else self._plain

    def timed(self, ids: torch.Tensor) -> tuple[float, float]:
        """Seconds of reading the prompts, and of each token that was written."""
        with torch.no_grad():
            if self._device == "cuda" and not self._compiled and self._graph is None:
                self._capture(ids)
            wait(self._device)
            start = time.perf_counter()
            self._read(ids)
            wait(self._device)
            read = time.perf_counter()
            for _ in range(self.new - 1):
                self._write()
            wait(self._device)
        return read - start, (time.perf_counter() - read) / (self.new - 1)

    def tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """`[rows, new]` that it writes."""
        self.timed(ids)
        with torch.no_grad():
            self._read(ids)
            found = [self._held.clone()]
            for _ in range(self.new - 1):
                self._write()
                found.append(self._held.clone())
        return torch.cat(found, dim=1)

    def _plain(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits = self._model(input_ids=ids, position_ids=position, past_key_values=self._cache, use_cache=True).logits
        chosen: torch.Tensor = logits[:, -1].argmax(-1, keepdim=True)
        return chosen

    def _read(self, ids: torch.Tensor) -> None:
        self._cache.reset()
        logits = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._held.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self._position.fill_(self._prompt)

    def _write(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        if self._compiled and self._device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        self._advance()

    def _advance(self) -> None:
        self._held.copy_(self._step(self._held, self._position))
        self._position += 1

    def _capture(self, ids: torch.Tensor) -> None:
        self._read(ids)
        for _ in range(3):
            self._advance()
        wait(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        self._graph = graph


def with_customers(model: Any, customers: int) -> Any:
    """PEFT's LoRA of rank 8 on q and v, as many adapters as customers, in the model's dtype."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config, adapter_name="c0", autocast_adapter_dtype=False)
    for number in range(1, customers):
        wrapped.add_adapter(f"c{number}", config, autocast_adapter_dtype=False)
    return wrapped.to(model.dtype).eval()
