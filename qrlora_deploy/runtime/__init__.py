"""Serving: onnxruntime, numpy, safetensors, pydantic, tokenizers and watchfiles; no torch, no transformers.

A name brings its own module alone: what only reads files runs without ONNX Runtime.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qrlora_deploy.runtime.bundle.bundle import Bundle, Manifest, open_bundle
    from qrlora_deploy.runtime.customers.packed import load_packed
    from qrlora_deploy.runtime.customers.store import CustomerStore, StoreEvent
    from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationEvent, GenerationRequest
    from qrlora_deploy.runtime.generation.sampling import Sampling
    from qrlora_deploy.runtime.generation.session import GenerationSession
    from qrlora_deploy.runtime.host.devices import Device
    from qrlora_deploy.runtime.prediction.predictor import Prediction, Predictor
    from qrlora_deploy.runtime.sessions.buckets import Buckets
    from qrlora_deploy.runtime.sessions.session import open_session
    from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
    from qrlora_deploy.runtime.verification.parity import ParityReport, verify

__all__ = [
    "Buckets",
    "Bundle",
    "CustomerStore",
    "Device",
    "GenerationAnswer",
    "GenerationEvent",
    "GenerationRequest",
    "GenerationSession",
    "Manifest",
    "ParityReport",
    "Prediction",
    "Predictor",
    "Sampling",
    "StoreEvent",
    "SwitchableSession",
    "load_packed",
    "open_bundle",
    "open_session",
    "verify",
]

_PLACES = {
    "bundle.bundle": ("Bundle", "Manifest", "open_bundle"),
    "customers.packed": ("load_packed",),
    "customers.store": ("CustomerStore", "StoreEvent"),
    "generation.requests": ("GenerationAnswer", "GenerationEvent", "GenerationRequest"),
    "generation.sampling": ("Sampling",),
    "generation.session": ("GenerationSession",),
    "host.devices": ("Device",),
    "prediction.predictor": ("Prediction", "Predictor"),
    "sessions.buckets": ("Buckets",),
    "sessions.session": ("open_session",),
    "sessions.switchable": ("SwitchableSession",),
    "verification.parity": ("ParityReport", "verify"),
}
"""Where each name comes from; type checkers read the same above, and a test compares the two."""


def __getattr__(name: str) -> Any:
    """Import the module of a public name when it is asked for first."""
    for module, names in _PLACES.items():
        if name in names:
            found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
