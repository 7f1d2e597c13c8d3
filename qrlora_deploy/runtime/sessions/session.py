"""Opening an ONNX Runtime session on exactly the device that was asked for."""

import ctypes
import os
import sys
import types
from pathlib import Path
from typing import Any

import onnxruntime

from qrlora_deploy.errors import FileFormatError, InputError, ProviderError, QrloraError, argument, first_line
from qrlora_deploy.runtime.host.captures import CAPTURES
from qrlora_deploy.runtime.host.devices import PROVIDERS, Device
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, check_runtime
from qrlora_deploy.runtime.table.cuda import device_count

__all__ = ["PROVIDERS", "check_provider", "open_session"]

QUIET = 4
"""ONNX Runtime's severity of what a session logs that asked for a GPU: our one line says it all."""

UNROUNDED = ("session.qdq_matmulnbits_accuracy_level", "1")
"""Where a graph multiplies by a weight that is dequantised in blocks, activations stay in fp32: ONNX Runtime rounds
them to 8 bits where nobody says otherwise. Bundles of this project say in each product what is rounded."""

NO_GPU = "no usable NVIDIA GPU or driver was found"

MAX_THREADS = 1024
"""ONNX Runtime starts them all at once and takes no error of the system for an answer."""


def open_session(
    model: str | os.PathLike[str],
    provider: str | Device = "cpu",
    threads: int | None = None,
    cuda_graph: bool = False,
) -> Any:
    """Open `model` on a device, with TF32 off. Nothing of the process is changed, such as its output or log level.

    Args:
        model: the ONNX file. Check a bundle with `open_bundle` first.
        provider: "cpu", "cuda", "cuda:1" or "tensorrt", or a `Device` with options of its own; a GPU
            is never replaced by the CPU silently.
        threads: threads within an operator; None leaves the choice to ONNX Runtime.
        cuda_graph: on CUDA, runs are captured and replayed by their `gpu_graph_id`; all inputs and
            outputs must then be bound to fixed addresses (`BucketRunner` does that).

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ProviderError: the provider is unknown or did not load; the message says what is missing. Or
            the graph is padding-free and this ONNX Runtime too old for that.
        FileFormatError: ONNX Runtime refuses the model.
        InputError: so many threads cannot be started.
    """
    model, device = Path(model), Device.of(provider)
    check_provider(device)
    name = PROVIDERS[device.provider]
    options = onnxruntime.SessionOptions()
    if threads is not None and not 0 <= threads <= MAX_THREADS:
        raise InputError(f"threads must be between 0 and {MAX_THREADS}, not {threads}")
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry(*UNROUNDED)
    if device.on_gpu:
        options.log_severity_level = QUIET
    else:
        # ONNX Runtime would keep kilobytes for every shape of a batch that it ever ran, and gain no time by it.
        options.enable_mem_pattern = False
    if device.configure is not None:
        device.configure(options)
    with CAPTURES.of(device.on_gpu):
        session, reason = _create(model, options, device, cuda_graph)
    if session is None or session.get_providers()[0] != name:
        raise _not_loaded(name, _missing(device.provider) or reason)
    if any(taken.name == TOKEN_INDEX for taken in session.get_inputs()):
        check_runtime()
    return session


def check_provider(provider: str | Device) -> None:
    """Make sure, as far as that is known without a model, that a session can be opened on a device.

    Raises:
        ProviderError: the provider is unknown, this ONNX Runtime does not have it, or there is no such GPU.
    """
    device = Device.of(provider)
    name = PROVIDERS[device.provider]
    if name not in onnxruntime.get_available_providers():
        raise ProviderError(
            f"{name} was asked for, but this build of ONNX Runtime has no such provider: "
            f"pip uninstall -y onnxruntime && pip install 'qrlora-deploy[gpu]' brings the one that has it, or pass "
            f"{argument('provider', 'cpu')}"
        )
    if device.on_gpu:
        _preload()
        reason = _why_no_gpu(device)
        if reason:
            raise _not_loaded(name, reason)


def _not_loaded(name: str, reason: str) -> ProviderError:
    return ProviderError(f"{name} was asked for but does not load: {reason}. Or pass {argument('provider', 'cpu')}")


def _create(model: Path, options: Any, device: Device, cuda_graph: bool) -> tuple[Any, str]:
    """The session, or None and ONNX Runtime's own reason."""
    index = {"device_id": str(device.index)}
    graph = str(int(cuda_graph and device.provider == "cuda"))
    own = dict(device.provider_options)
    cuda = ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": graph} | index | own)
    chains: dict[str, list[Any]] = {
        "cpu": [("CPUExecutionProvider", own)],
        "cuda": [cuda, "CPUExecutionProvider"],
        "tensorrt": [("TensorrtExecutionProvider", index), cuda, "CPUExecutionProvider"],
    }
    try:
        # Without the fallback, which says on stdout that it goes on with another provider.
        session = onnxruntime.InferenceSession(
            str(model), options, providers=chains[device.provider], enable_fallback=0
        )
        return session, NO_GPU
    # Its exceptions share no base class of their own.
    except Exception as error:
        if device.on_gpu:
            return None, first_line(error)
        raise FileFormatError(f"{model} cannot be opened by ONNX Runtime: {first_line(error)}") from error


def _preload() -> None:
    """Load CUDA and cuDNN from the wheels that pip installed."""
    preload = getattr(onnxruntime, "preload_dlls", None)
    if isinstance(preload, types.FunctionType):
        # It prints what it does not find. A copy of it that does not leaves everybody's stdout alone.
        silent = preload.__globals__ | {"print": lambda *_, **__: None}
        preload = types.FunctionType(
            preload.__code__, silent, preload.__name__, preload.__defaults__, preload.__closure__
        )
    if preload is not None:
        preload()


def _why_no_gpu(device: Device) -> str:
    """Why ONNX Runtime could not use this GPU, which it would say on pages of stderr; empty where it can.

    It logs there through the process's own logger, whose level is not ours to change.
    """
    if not _library(device.provider).is_file():
        # Built another way, with its libraries elsewhere: only ONNX Runtime knows.
        return ""
    reason = _missing(device.provider)
    if reason:
        return reason
    try:
        count = device_count()
    except QrloraError as error:
        return str(error)
    if count > device.index:
        return ""
    return NO_GPU if not count else f"there is no GPU {device.index}, but {count} of them, counted from 0"


def _library(part: str) -> Path:
    pattern = "onnxruntime_providers_{}.dll" if sys.platform == "win32" else "libonnxruntime_providers_{}.so"
    return Path(onnxruntime.__file__).parent / "capi" / pattern.format(part)


def _missing(provider: str) -> str:
    """Why a provider did not load, as far as the dynamic linker can tell; empty where it could."""
    try:
        ctypes.CDLL(str(_library("shared")), mode=getattr(ctypes, "RTLD_GLOBAL", 0))
        ctypes.CDLL(str(_library(provider)))
    except OSError as error:
        library, _, rest = str(error).partition(":")
        if "cannot open shared object" in rest:
            hint = "pip install 'qrlora-deploy[cuda]' brings it" if provider == "cuda" else "install TensorRT"
            return f"{library} was not found; {hint}"
        return first_line(error)
    return ""
