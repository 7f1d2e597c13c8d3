"""A small `triton_python_backend_utils`: what the front uses of Triton's Python backend, over ONNX Runtime.

As Triton does, it refuses batches that are too large or have other inputs than the graph, and joins batches of one
shape that wait at the same time.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

TRITONSERVER_MEMORY_CPU = 0
MOST_ROWS = 4


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray) and array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    NOT_FOUND, INVALID_ARG, UNAVAILABLE, INTERNAL = "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "INTERNAL"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def arrays(self) -> dict[str, np.ndarray]:
        return {tensor.name(): tensor.as_numpy() for tensor in self.tensors}


class PreferredMemory:
    def __init__(self, kind: int, device: int) -> None:
        self.kind, self.device = kind, device


class Asked:
    """A request of a client, as the front gets it."""

    def __init__(self, inputs: dict[str, list[Any]], outputs: Sequence[str], parameters: dict[str, Any]) -> None:
        self._outputs, self._parameters = outputs, parameters
        self.inputs = {name: Tensor(name, _column(values)) for name, values in inputs.items()}

    def requested_output_names(self) -> list[str]:
        return list(self._outputs)

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""


def _column(values: list[Any]) -> np.ndarray:
    found = np.empty((len(values), 1), dtype=object)
    found[:, 0] = [value.encode() if isinstance(value, str) else value for value in values]
    return found


class Backend:
    """The module, with the graphs that it runs.

    Args:
        repository: whose graphs run.

    Attributes:
        runs: of each run the inputs that it was given, several batches joined.
        fails: whether every graph is broken.
        loaded: whether the graphs are loaded.
    """

    Tensor, TritonError, InferenceResponse, PreferredMemory = Tensor, TritonError, InferenceResponse, PreferredMemory
    TRITONSERVER_MEMORY_CPU = TRITONSERVER_MEMORY_CPU

    def __init__(self, repository: Path) -> None:
        self._sessions = {
            model.parents[1].name: onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            for model in repository.glob("*/1/model.onnx")
        }
        self.runs: list[dict[str, np.ndarray]] = []
        self.fails, self.loaded = False, True
        self._waiting: list[tuple[Any, asyncio.Future[InferenceResponse]]] = []

    @staticmethod
    def get_input_tensor_by_name(request: Asked, name: str) -> Tensor | None:
        return request.inputs.get(name)

    @staticmethod
    def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
        return next((tensor for tensor in response.tensors if tensor.name() == name), None)

    def InferenceRequest(self, **fields: Any) -> "Any":
        assert fields["preferred_memory"].kind == TRITONSERVER_MEMORY_CPU
        return _Inner(self, fields["model_name"], fields["requested_output_names"], fields["inputs"])

    def wait(self, inner: "_Inner") -> "asyncio.Future[InferenceResponse]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[InferenceResponse] = loop.create_future()
        self._waiting.append((inner, future))
        loop.call_soon(self._run_waiting)
        return future

    def _run_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        while waiting:
            key = waiting[0][0].key()
            together = [one for one in waiting if one[0].key() == key]
            waiting = [one for one in waiting if one[0].key() != key]
            self._run(together)

    def _run(self, together: list[tuple["_Inner", "asyncio.Future[InferenceResponse]"]]) -> None:
        first = together[0][0]
        session = self._sessions[first.model]
        needed = {value.name: value.shape[1:] for value in session.get_inputs()}
        assert set(first.arrays) == set(needed)
        rows = [len(next(iter(inner.arrays.values()))) for inner, _ in together]
        assert max(rows) <= MOST_ROWS, "Triton refuses a batch of more rows than max_batch_size"
        for inner, _ in together:
            for name, array in inner.arrays.items():
                fixed = [size for size in needed[name] if isinstance(size, int)]
                assert array.ndim == 2 and (not fixed or array.shape[1] == fixed[0])
        if self.fails:
            for _, future in together:
                future.set_result(InferenceResponse([], TritonError("out of memory")))
            return
        joined = {name: np.concatenate([inner.arrays[name] for inner, _ in together]) for name in needed}
        self.runs.append(joined)
        outputs = session.run(first.outputs, joined)
        for start, count, (_, future) in zip(np.cumsum([0, *rows]), rows, together, strict=False):
            parts = [array[start : start + count] for array in outputs]
            named = [Tensor(*pair) for pair in zip(first.outputs, map(np.ascontiguousarray, parts), strict=True)]
            future.set_result(InferenceResponse(named))


class _Inner:
    """A request of the front to the graph's model."""

    def __init__(self, backend: Backend, model: str, outputs: Sequence[str], inputs: Sequence[Tensor]) -> None:
        self._backend, self.model, self.outputs = backend, model, list(outputs)
        self.arrays = {tensor.name(): tensor.as_numpy() for tensor in inputs}

    def key(self) -> tuple[Any, ...]:
        return self.model, tuple((name, array.shape[1:]) for name, array in self.arrays.items())

    async def async_exec(self) -> InferenceResponse:
        if not self._backend.loaded:
            raise RuntimeError(f"Model {self.model!r} is not ready")
        return await self._backend.wait(self)
