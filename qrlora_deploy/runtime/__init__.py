"""Serving: onnxruntime, numpy, safetensors, pydantic, tokenizers and watchfiles; no torch, no transformers."""

from qrlora_deploy.runtime.buckets import Buckets
from qrlora_deploy.runtime.bundle import Bundle, Manifest, open_bundle
from qrlora_deploy.runtime.devices import Device
from qrlora_deploy.runtime.packed import load_packed
from qrlora_deploy.runtime.parity import ParityReport, verify
from qrlora_deploy.runtime.predictor import Prediction, Predictor
from qrlora_deploy.runtime.session import open_session
from qrlora_deploy.runtime.store import CustomerStore, StoreEvent
from qrlora_deploy.runtime.switchable import SwitchableSession

__all__ = [
    "Buckets",
    "Bundle",
    "CustomerStore",
    "Device",
    "Manifest",
    "ParityReport",
    "Prediction",
    "Predictor",
    "StoreEvent",
    "SwitchableSession",
    "load_packed",
    "open_bundle",
    "open_session",
    "verify",
]
