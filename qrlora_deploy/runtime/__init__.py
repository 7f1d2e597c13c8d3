"""Serving: onnxruntime, numpy, safetensors, pydantic, tokenizers and watchfiles; no torch, no transformers."""

from qrlora_deploy.runtime.bundle.bundle import Bundle, Manifest, open_bundle
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.store import CustomerStore, StoreEvent
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
