"""Where a fleet's seconds go: what the host does in turn, what its threads do beside, and what the device computes."""

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from qrlora_deploy.training.fleet import engine, run
from qrlora_deploy.training.fleet.engine import Engine
from qrlora_deploy.training.fleet.model import FleetModel
from qrlora_deploy.training.fleet.schedule import Schedule, StepRows
from qrlora_deploy.training.fleet.tokens import RowEncoder, TokensAhead
from qrlora_deploy.training.fleet.writing import Writer

STAGES: tuple[tuple[str, Any, str], ...] = (
    ("read the data", run, "choose_customers"),
    ("load the base", FleetModel, "__init__"),
    ("wait for tokens", TokensAhead, "take"),
    ("enter", Engine, "enter"),
    ("launch the trunk", Engine, "_run_trunk"),
    ("choose rows", Schedule, "next_rows"),
    ("prepare chunks", Engine, "_chunk"),
    ("copy to the device", engine, "ship"),
    ("launch steps", Engine, "train_step"),
    ("launch the optimizer", FleetModel, "step"),
    ("wait for losses", Engine, "take_losses"),
    ("score held-out rows", Engine, "answer_held_out"),
    ("wait for results", FleetModel, "best"),
    ("end the threads", Writer, "close"),
    ("make tokens", RowEncoder, "__call__"),
    ("make and write files", Writer, "_write"),
)
"""Name, owner and function of each stage; the last two run in threads of their own."""

ON_DEVICE = (("trunk", Engine, "_run_trunk"), ("steps", Engine, "train_step"))
PROFILED_STEP, COUNTED_STEP = 3, 4
"""Which steps are looked into: the first ones choose kernels and take memory."""
SHOWN_KERNELS = 15


class Split:
    """Seconds of each stage without those of the stages inside it, by thread.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.host: dict[str, float] = defaultdict(float)
        self.threads: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._inner = threading.local()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Run the block with every stage timed."""
        with ExitStack() as stack:
            for name, owner, function in ON_DEVICE if self.device == "cuda" else ():
                stack.enter_context(patch.object(owner, function, self._spanned(name, getattr(owner, function))))
            for name, owner, function in STAGES:
                stack.enter_context(patch.object(owner, function, self._timed(name, getattr(owner, function))))
            yield

    def record(self, seconds: float) -> dict[str, Any]:
        """What was found in a run of so many seconds.

        `device_seconds` are from the first kernel of each trunk or step to its last, so they hold what
        the device waited for launches in between; `device_idle_seconds` are the rest of the time from
        the first trunk to the last step.
        """
        found: dict[str, Any] = {
            "seconds": seconds,
            "steps": self.steps,
            "host_seconds": dict(self.host) | {"everything else": seconds - sum(self.host.values())},
            "thread_seconds": dict(self.threads),
        }
        if self._spans:
            torch.cuda.synchronize()
            busy = {
                name: sum(begin.elapsed_time(end) for begin, end in spans) / 1000 for name, spans in self._spans.items()
            }
            whole = self._spans["trunk"][0][0].elapsed_time(self._spans["steps"][-1][1]) / 1000
            found |= {"device_seconds": busy, "device_idle_seconds": whole - sum(busy.values())}
        return found

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            outside, self._inner.seconds = getattr(self._inner, "seconds", 0.0), 0.0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                main = threading.current_thread() is threading.main_thread()
                (self.host if main else self.threads)[name] += whole - self._inner.seconds
                self._inner.seconds = outside + whole
                self.steps += name == "launch steps"

        return timed

    def _spanned(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def spanned(*args: Any, **kwargs: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            found = function(*args, **kwargs)
            end.record()
            self._spans[name].append((begin, end))
            return found

        return spanned


class StepView:
    """One step looked into by PyTorch's profiler, and the arithmetic of another one counted.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.found: dict[str, Any] = {}
        self._step = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Run the block, which trains a fleet."""
        step = Engine.train_step

        def looked_into(trained: Engine, rows: StepRows, *rest: Any) -> None:
            self._step += 1
            if self._step == PROFILED_STEP:
                self._profile(trained, rows, functools.partial(step, trained, rows, *rest))
            elif self._step == COUNTED_STEP:
                with FlopCounterMode(display=False) as counter:
                    step(trained, rows, *rest)
                self.found["tflop"] = counter.get_total_flops() / 1e12
            else:
                step(trained, rows, *rest)

        with patch.object(Engine, "train_step", looked_into):
            yield

    def _profile(self, trained: Engine, rows: StepRows, step: Callable[[], None]) -> None:
        lengths = trained.pool.lengths[rows.slots, rows.rows]
        cuda = self.device == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=kinds) as profiler:
            start = time.perf_counter()
            step()
            launched = time.perf_counter() - start
            if cuda:
                torch.cuda.synchronize()
            wall = time.perf_counter() - start
        events = profiler.key_averages()
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        shown = [(event.key, event.count, event.self_device_time_total) for event in kernels]
        if not cuda:
            shown = [(event.key, event.count, event.self_cpu_time_total) for event in events]
        shown.sort(key=lambda item: -item[2])
        self.found |= {
            "rows": len(rows.rows),
            "tokens": int(lengths.sum()),
            "lengths": len(set(lengths.tolist())),
            "chunks": len(trained._chunks(rows)),
            "ms_under_the_profiler": 1000 * wall,
            "ms_until_launched_under_the_profiler": 1000 * launched,
            "kernels": sum(count for _, count, _ in shown),
            "kernel_ms": sum(time for _, _, time in shown) / 1000,
            "longest": [
                {"name": name[:120], "count": count, "ms": time / 1000} for name, count, time in shown[:SHOWN_KERNELS]
            ],
        }


@contextmanager
def without_blocks() -> Iterator[None]:
    """Run the block, which trains a fleet, with the blocks of the base left out: what is left is the host's work."""

    def logits(model: FleetModel, *_: Any) -> torch.Tensor:
        coefficients = model.values.parts[0]
        return coefficients.new_zeros(len(coefficients), model.limits.shape[1]) + coefficients.sum(1, keepdim=True)

    def trunk(_: FleetModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.zeros(*batch["input_ids"].shape, 1, device=batch["input_ids"].device)

    with patch.object(FleetModel, "logits_packed", logits), patch.object(FleetModel, "trunk", trunk):
        yield


def lines(record: dict[str, Any]) -> Iterator[str]:
    """A record of both for the terminal."""
    split, step = record["split"], record["step"]
    yield f"{split['seconds']:.2f} s, {split['steps']} steps"
    for part in ("host_seconds", "thread_seconds", "device_seconds"):
        for name, seconds in sorted(split.get(part, {}).items(), key=lambda item: -item[1]):
            yield f"  {part.removesuffix('_seconds'):8}{seconds:9.3f} s  {name}"
    if "device_idle_seconds" in split:
        yield f"  device  {split['device_idle_seconds']:9.3f} s  idle between them"
    if not step:
        return
    yield (
        f"one step: {step['rows']} rows, {step['tokens']} tokens of {step['lengths']} lengths, "
        f"in {step['chunks']} chunks; {step['kernels']} kernels, {step['kernel_ms']:.2f} ms; "
        f"{step['tflop']:.2f} TFLOP; launched in "
        f"{step['ms_until_launched_under_the_profiler']:.1f} ms under the profiler"
    )
    for kernel in step["longest"]:
        yield f"  {kernel['ms']:9.3f} ms {kernel['count']:5d} x {kernel['name']}"
