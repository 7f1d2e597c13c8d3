"""Serving: needs onnxruntime, numpy, safetensors, pydantic and tokenizers, neither torch nor transformers."""

from qrlora_deploy.runtime.buckets import Buckets
from qrlora_deploy.runtime.bundle import Bundle, Manifest, open_bundle
from qrlora_deploy.runtime.parity import ParityReport, verify
from qrlora_deploy.runtime.predictor import Prediction, Predictor
from qrlora_deploy.runtime.session import open_session
from qrlora_deploy.runtime.switchable import SwitchableSession

__all__ = [
    "Buckets",
    "Bundle",
    "Manifest",
    "ParityReport",
    "Prediction",
    "Predictor",
    "SwitchableSession",
    "open_bundle",
    "open_session",
    "verify",
]
