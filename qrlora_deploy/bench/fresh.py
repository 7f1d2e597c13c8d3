"""A subject in a process of its own: from opening to the first answer, and how much memory it takes."""

import importlib
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

from qrlora_deploy.bench.environment import gpu_memory_bytes, host_memory_bytes
from qrlora_deploy.bench.opening import open_subject
from qrlora_deploy.bench.report_parts import Memory
from qrlora_deploy.bench.subjects import Spec
from qrlora_deploy.bench.workload import Workload
from qrlora_deploy.errors import QrloraError

RUNS = 3


@dataclass(frozen=True)
class Fresh:
    """What a fresh process saw.

    Attributes:
        first_answer_s: from opening, digests checked, to the first logits; imports come before.
        memory: at the end, after some runs of the largest workload.
    """

    first_answer_s: float
    memory: Memory


def start_fresh(spec: Spec, first: Workload, large: Workload) -> Fresh:
    """Open `spec` in a new process, answer `first` once and `large` some times.

    The files were read before, so they come from the system's memory and not from the disk. A
    switchable bundle loads the customers of `spec` too.

    Raises:
        QrloraError: the process ended; errors of the subject come through as they are.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_run, spec, first, large).result()
    except BrokenProcessPool as error:
        raise QrloraError(f"{spec.name}: the process that opened it ended; there may be too little memory") from error


def _run(spec: Spec, first: Workload, large: Workload) -> Fresh:
    for name in ("onnxruntime",) if spec.kind == "bundle" else ("torch", "transformers"):
        importlib.import_module(name)
    device_before = gpu_memory_bytes() if spec.provider != "cpu" else None
    before = host_memory_bytes(peak=False)
    start = time.perf_counter()
    subject = open_subject(spec, [first, large])
    subject.prepare(first)(0)
    elapsed = time.perf_counter() - start
    call = subject.prepare(large)
    for turn in range(RUNS):
        call(turn)
    device_after = gpu_memory_bytes() if device_before is not None else None
    device = device_after - device_before if device_after is not None and device_before is not None else None
    return Fresh(
        elapsed, Memory(host_peak_bytes=host_memory_bytes(True), host_before_bytes=before, device_bytes=device)
    )
