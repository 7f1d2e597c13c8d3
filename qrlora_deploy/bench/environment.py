"""The machine of a measurement: what decides a latency and is not in the bundle."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

from qrlora_deploy.bench.report_parts import Environment
from qrlora_deploy.version import __version__

PACKAGES = ("onnxruntime-gpu", "onnxruntime", "numpy", "tokenizers", "safetensors", "torch", "transformers", "peft")

GPU_FACTS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "persistence_mode",
    "power.limit",
    "temperature.gpu",
)

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
CPU_INFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
SMI_TIMEOUT_S = 20


def describe_environment() -> Environment:
    """Look at the machine; what cannot be seen is left out."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    host: dict[str, str | int | float | None] = {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": affinity,
        "governor": _read_line(GOVERNOR),
        "cpu_mhz": _cpu_mhz(),
    }
    return Environment(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        host=host,
        gpus=query_gpus(GPU_FACTS),
        versions=_versions(),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def query_gpus(facts: tuple[str, ...]) -> list[dict[str, str]]:
    """What `nvidia-smi` says of each GPU; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(facts)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    return [dict(zip(facts, row, strict=True)) for row in rows if len(row) == len(facts)]


def gpu_memory_bytes() -> int | None:
    """Memory in use on all GPUs; None where there is none."""
    cells = [gpu["memory.used"].split()[0] for gpu in query_gpus(("memory.used",))]
    sizes = [int(cell) * 2**20 for cell in cells if cell.isdigit()]
    return sum(sizes) if sizes else None


def host_memory_bytes(peak: bool) -> int:
    """Resident memory of this process, now or at its largest; 0 where the system does not tell.

    The peak of `/proc` is this program's alone; that of `getrusage` is inherited from the parent.
    """
    name = "VmHWM:" if peak else "VmRSS:"
    for line in _lines(STATUS):
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 0


def _versions() -> dict[str, str]:
    found = {"qrlora-deploy": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    names = [line.partition(":")[2].strip() for line in _lines(CPU_INFO) if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _cpu_mhz() -> float | None:
    clocks = [line.partition(":")[2].strip() for line in _lines(CPU_INFO) if line.startswith("cpu MHz")]
    return float(clocks[0]) if clocks and clocks[0].replace(".", "", 1).isdigit() else None


def _read_line(path: Path) -> str | None:
    lines = _lines(path)
    return lines[0].strip() if lines else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
