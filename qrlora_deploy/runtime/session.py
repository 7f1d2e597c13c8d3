"""Opening an ONNX Runtime session on exactly the device that was asked for."""

import contextlib
import ctypes
import io
import sys
from pathlib import Path
from typing import Any

import onnxruntime

from qrlora_deploy.errors import FileFormatError, InputError, ProviderError, first_line
from qrlora_deploy.runtime.token_index import TOKEN_INDEX, check_runtime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
QUIET, DEFAULT_SEVERITY = 4, 2
MAX_THREADS = 1024
"""ONNX Runtime starts them all at once and takes no error of the system for an answer."""


def open_session(model: Path, provider: str = "cpu", threads: int | None = None, cuda_graph: bool = False) -> Any:
    """Open `model` on `provider`, "cpu", "cuda" or "tensorrt", with TF32 off.

    Args:
        model: the ONNX file. Check a bundle with `open_bundle` first.
        provider: a GPU is never replaced by the CPU silently.
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
    if provider not in PROVIDERS:
        raise ProviderError(f"unknown provider {provider!r}; choose from {', '.join(PROVIDERS)}")
    name = PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise ProviderError(
            f"{name} was asked for, but this build of ONNX Runtime has no such provider. "
            f"Install onnxruntime-gpu, or pass --provider cpu"
        )
    options = onnxruntime.SessionOptions()
    if threads is not None and not 0 <= threads <= MAX_THREADS:
        raise InputError(f"threads must be between 0 and {MAX_THREADS}, not {threads}")
    if threads is not None:
        options.intra_op_num_threads = threads
    if provider != "cpu":
        _preload()
    session, reason = _create(model, options, provider, cuda_graph)
    if session is None or session.get_providers()[0] != name:
        raise ProviderError(
            f"{name} was asked for but does not load: {_missing(provider) or reason}. Or pass --provider cpu"
        )
    if any(taken.name == TOKEN_INDEX for taken in session.get_inputs()):
        check_runtime()
    return session


def _create(model: Path, options: Any, provider: str, cuda_graph: bool) -> tuple[Any, str]:
    """The session, or None and ONNX Runtime's own reason."""
    graph = str(int(cuda_graph and provider == "cuda"))
    cuda = ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": graph})
    chains: dict[str, list[Any]] = {
        "cpu": ["CPUExecutionProvider"],
        "cuda": [cuda, "CPUExecutionProvider"],
        "tensorrt": ["TensorrtExecutionProvider", cuda, "CPUExecutionProvider"],
    }
    # ONNX Runtime writes pages to both streams when a provider does not load; our one line says it all.
    if provider != "cpu":
        onnxruntime.set_default_logger_severity(QUIET)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            session = onnxruntime.InferenceSession(str(model), options, providers=chains[provider])
        return session, "no usable NVIDIA GPU or driver was found"
    # Its exceptions share no base class of their own.
    except Exception as error:
        if provider != "cpu":
            return None, first_line(error)
        raise FileFormatError(f"{model} cannot be opened by ONNX Runtime: {first_line(error)}") from error
    finally:
        onnxruntime.set_default_logger_severity(DEFAULT_SEVERITY)


def _preload() -> None:
    """Load CUDA and cuDNN from the wheels that pip installed; it prints what it does not find."""
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


def _missing(provider: str) -> str:
    """Why a provider did not load, as far as the dynamic linker can tell; empty where it could."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    pattern = "onnxruntime_providers_{}.dll" if sys.platform == "win32" else "libonnxruntime_providers_{}.so"
    try:
        ctypes.CDLL(str(folder / pattern.format("shared")), mode=getattr(ctypes, "RTLD_GLOBAL", 0))
        ctypes.CDLL(str(folder / pattern.format(provider)))
    except OSError as error:
        library, _, rest = str(error).partition(":")
        if "cannot open shared object" in rest:
            hint = "pip install 'qrlora-deploy[cuda]' brings it" if provider == "cuda" else "install TensorRT"
            return f"{library} was not found; {hint}"
        return first_line(error)
    return ""
