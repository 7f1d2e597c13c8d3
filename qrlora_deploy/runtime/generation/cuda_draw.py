"""Tokens are drawn on a GPU, from the logits that a run left there: a few bytes come back instead of all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.generation.cuda_arrays import CudaArrays
from qrlora_deploy.runtime.generation.sampling import Choice
from qrlora_deploy.runtime.generation.wishes import (
    ANSWERS,
    DRAWN,
    IDS,
    LOGITS,
    LOGPROB,
    LOGPROBS,
    MANY,
    SETTINGS,
    TOLD,
    WHOLE_SHARE,
    Wish,
)
from qrlora_deploy.runtime.host.captures import CAPTURES
from qrlora_deploy.runtime.sessions.running import run_bound

ONNX_TYPES: dict[Any, int] = {np.float32: 1, np.int64: 7, np.float64: 11}

NOT_ASKED = Wish(1.0, 1, WHOLE_SHARE, 0.0, 0.0)
"""Of rows whose token is known already."""


class CudaDrawer:
    """Draws the next tokens of a batch. All runs are of one thread.

    Args:
        sessions: `onnxruntime.InferenceSession`s of `wishes.FILE` and of `wishes.FILE_OF_ALL`.
        device: number of the GPU.
        logits: where they lie, `[rows, vocabulary]` fp32.
        rows: of a batch at most.
        vocabulary: logits of a row.
        captured: whether runs are captured, a graph for each size of batch; the sessions were opened so.
    """

    def __init__(
        self, sessions: tuple[Any, Any], device: int, logits: int, rows: int, vocabulary: int, captured: bool = True
    ) -> None:
        self._sessions, self._device, self._logits, self._vocabulary = sessions, device, logits, vocabulary
        self._captured, self._told = captured, min(TOLD, vocabulary)
        self._widths = {name: min(width, vocabulary) for name, (_, width) in ANSWERS.items()}
        kinds: dict[str, tuple[Any, int]] = dict.fromkeys(SETTINGS, (np.float64, rows))
        kinds |= {name: (kind, rows * self._widths[name]) for name, (kind, _) in ANSWERS.items()}
        self._arrays = CudaArrays(kinds, device)
        self._bound: dict[tuple[Any, int], tuple[Any, Any]] = {}

    def draw(self, rows: int, wishes: Mapping[int, Wish]) -> dict[int, Choice]:
        """Tokens of some of the rows of the run before; who is not there must look at all logits.

        Args:
            rows: of that run.
            wishes: by row.
        """
        asked = [wishes.get(row, NOT_ASKED) for row in range(rows)]
        for name in SETTINGS:
            self._arrays.host[name][:rows] = [getattr(wish, name) for wish in asked]
        best, of_all = self._sessions
        found: dict[int, Choice] = {}
        try:
            self._arrays.upload(SETTINGS)
            found |= self._run(best, tuple(ANSWERS), rows, wishes)
            left = {row: wish for row, wish in wishes.items() if row not in found and wish.top_k == MANY}
            if left:
                found |= self._run(of_all, (DRAWN, LOGPROB), rows, left)
        except (MemoryError, QrloraError):
            # Without room for what is computed here, the host computes it.
            pass
        return found

    def _run(self, session: Any, answers: Sequence[str], rows: int, wishes: Mapping[int, Wish]) -> dict[int, Choice]:
        key = session, rows
        bound = self._bound.get(key)
        binding, options = bound or (self._bind(session, answers, rows), self._options(rows))
        with CAPTURES.of(True, captures=self._captured and bound is None):
            run_bound(session, binding, options)
        self._bound[key] = binding, options
        telling = any(wish.told is not None for wish in wishes.values())
        for name in answers if telling else (DRAWN,):
            self._arrays.begin_download(name, rows * self._widths[name])
        self._arrays.copies.wait()
        tokens = self._arrays.host[DRAWN][:rows].tolist()
        return {
            row: Choice(tokens[row]) if wish.told is None else self._with_logprobs(row, wish.told)
            for row, wish in wishes.items()
            if tokens[row] >= 0
        }

    def _with_logprobs(self, row: int, count: int) -> Choice:
        host, first = self._arrays.host, row * self._told
        last = first + min(count, self._told)
        best = zip(*(host[name][first:last].tolist() for name in (IDS, LOGPROBS)), strict=True)
        return Choice(int(host[DRAWN][row]), float(host[LOGPROB][row]), tuple(best))

    def _bind(self, session: Any, answers: Sequence[str], rows: int) -> Any:
        binding, pointers = session.io_binding(), self._arrays.pointers
        place = ("cuda", self._device)
        binding.bind_input(LOGITS, *place, ONNX_TYPES[np.float32], (rows, self._vocabulary), self._logits)
        for name in SETTINGS:
            binding.bind_input(name, *place, ONNX_TYPES[np.float64], (rows, 1), pointers[name])
        for name in answers:
            element = ONNX_TYPES[ANSWERS[name][0]]
            binding.bind_output(name, *place, element, (rows, self._widths[name]), pointers[name])
        return binding

    def _options(self, rows: int) -> Any:
        options = onnxruntime.RunOptions()
        if self._captured:
            options.add_run_config_entry("gpu_graph_id", str(rows))
        return options
