"""What this machine can do: versions, GPU, execution providers that really load, and what to do."""

import base64
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qrlora_deploy.errors import FileFormatError, ProviderError, first_line
from qrlora_deploy.installation.parts import NAMES, PARTS, lacking
from qrlora_deploy.io.temporary import scratch_folder
from qrlora_deploy.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "optimum",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "scipy",
    "safetensors",
    "tokenizers",
    "datasets",
)

PROVIDERS = ("cpu", "cuda", "tensorrt")

INSTALL_GPU = "pip install 'qrlora-deploy[gpu]'"

REINSTALL_TORCH = "pip install --force-reinstall torch brings the build with CUDA on Linux"

LITTLE_BYTES = 2 * 10**9
"""Less free memory or disk than this is worth a word: an encoder's checkpoint and bundle take half of it."""

PROBE = "CAgSADpEChEKAXgKAXgSAXkiBk1hdE11bBIFcHJvYmVaEwoBeBIOCgwIARIICgIIAgoCCAJiEwoBeRIOCgwIARIICgIIAgoCCAJCBAoAEBE="
"""An ONNX model, y = x @ x for x [2, 2]: a serving host has no `onnx` package to build one."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        group: "version", "part", "resource", "device" or "provider".
        works: whether it can be used; None where that is no question, as for a version.
        detail: what was found.
        advice: what to do, empty where nothing is.
    """

    group: str
    name: str
    works: bool | None
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Health:
    """All findings. `usable` is whether the CPU provider runs a model, the least that is needed."""

    findings: tuple[Finding, ...]
    usable: bool


def examine(progress: Callable[[str, int, int], None] | None = None) -> Health:
    """Look at the machine; nothing is changed, and nothing that is missing is an error."""
    steps: list[Callable[[], list[Finding]]] = [versions, parts, resources, devices, providers]
    findings: list[Finding] = []
    for index, step in enumerate(steps):
        findings += step()
        if progress:
            progress("doctor", index + 1, len(steps))
    usable = any(item.group == "provider" and item.name == "cpu" and item.works for item in findings)
    return Health(tuple(findings), usable)


def versions() -> list[Finding]:
    """This tool, Python and the libraries."""
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    found = [
        Finding("version", "qrlora-deploy", None, __version__),
        Finding("version", "python", None, f"{platform.python_version()} on {system}"),
    ]
    installed = {name: version for name in PACKAGES if (version := _version(name))}
    found += [Finding("version", name, None, version) for name, version in installed.items()]
    if {"onnxruntime", "onnxruntime-gpu"} <= installed.keys():
        advice = f"pip uninstall -y onnxruntime onnxruntime-gpu && {INSTALL_GPU} (or [cpu] where there is no GPU)"
        detail = "both onnxruntime and onnxruntime-gpu are installed and overwrite each other's files"
        found.append(Finding("version", "onnxruntime twice", False, detail, advice))
    return found


def parts() -> list[Finding]:
    """Which parts of the installation are there."""
    found = []
    for part, modules in PARTS.items():
        missing = lacking(modules)
        detail = f"not installed: {', '.join(NAMES.get(name, name) for name in missing)}" if missing else "installed"
        advice = _install(part) if missing else ""
        found.append(Finding("part", f"part {part}", not missing, detail, advice))
    return found


def _install(*parts: str) -> str:
    return f"pip install 'qrlora-deploy[{','.join(parts)}]'"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def resources() -> list[Finding]:
    """Memory, and room on the disks where files are written."""
    found = []
    total, free = _memory_bytes("SC_PHYS_PAGES"), _memory_bytes("SC_AVPHYS_PAGES")
    if total:
        found.append(_room("memory", free or total, total, "close other programs, or a large table will not fit"))
    for name, folder in (("disk, this folder", Path.cwd()), ("disk, temporary", Path(tempfile.gettempdir()))):
        usage = shutil.disk_usage(folder)
        found.append(_room(name, usage.free, usage.total, f"make room on the disk of {folder}"))
    return found


def _room(name: str, free_bytes: int, total_bytes: int, advice: str) -> Finding:
    enough = free_bytes >= LITTLE_BYTES
    return Finding(
        "resource",
        name,
        enough,
        f"{free_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB free",
        "" if enough else advice,
    )


def _memory_bytes(name: str) -> int:
    """Memory by its name in `os.sysconf`; 0 where the system does not tell."""
    try:
        return int(os.sysconf(name)) * int(os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return 0


def devices() -> list[Finding]:
    """The GPUs of the driver, and whether PyTorch reaches them."""
    gpus = _driver_gpus()
    names = "; ".join(gpus) or "no NVIDIA driver answers"
    found = [Finding("device", "gpu", bool(gpus), names)]
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        advice = f"only needed to train, factorize, merge and export: {_install('train', 'export')}"
        return [*found, Finding("device", "torch cuda", False, first_line(error), advice)]
    if torch.cuda.is_available():
        detail = f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
        return [*found, Finding("device", "torch cuda", True, detail)]
    if torch.version.cuda is None:
        detail, advice = f"torch {torch.__version__} is built for the CPU", REINSTALL_TORCH
    else:
        detail, advice = f"torch needs CUDA {torch.version.cuda} and finds no device", "update the NVIDIA driver"
    return [*found, Finding("device", "torch cuda", False, detail, advice if gpus else "")]


def _driver_gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def providers() -> list[Finding]:
    """Which execution providers run a model here: being listed by ONNX Runtime is not enough."""
    try:
        from qrlora_deploy.runtime.sessions.session import open_session
    except ImportError as error:
        advice = f"{INSTALL_GPU} (or [cpu] where there is no GPU)"
        return [Finding("provider", name, False, first_line(error), advice) for name in PROVIDERS]
    found = []
    with scratch_folder() as folder:
        model = folder / "probe.onnx"
        model.write_bytes(base64.b64decode(PROBE))
        for name in PROVIDERS:
            try:
                with _silent_stderr():
                    open_session(model, name)
            except (ProviderError, FileFormatError) as error:
                advice = f"pip install --force-reinstall 'qrlora-deploy[{name}]'" if name == "cpu" else ""
                found.append(Finding("provider", name, False, first_line(error), advice))
            else:
                found.append(Finding("provider", name, True, "loads and opens a model"))
    return found


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep what a native library writes to file descriptor 2 off the screen: the error says it."""
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(sink)
        os.close(kept)
