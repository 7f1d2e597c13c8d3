"""QR-LoRA adapters from training to production: one frozen basis, a small vector per customer.

The main jobs, each as a command of the same name does it:

    import qrlora_deploy as qr

    basis = qr.factorize("base", tau=0.5)
    basis.save("basis.safetensors")
    acme = qr.train("base", basis, "acme.tsv", evaluation="dev.tsv")
    acme.save("customers/acme.safetensors")
    qr.export("base", basis, "bundle")
    print(qr.open_predictor("bundle", customers="customers").predict(["where is my parcel?"], customers=["acme"]))

Nothing is imported before it is asked for: a name brings its own module alone, so serving needs no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qrlora_deploy.deprecated import moved as _moved
from qrlora_deploy.version import __version__

if TYPE_CHECKING:
    from qrlora_deploy.api.combining import combine
    from qrlora_deploy.api.converting import convert
    from qrlora_deploy.api.exporting import export
    from qrlora_deploy.api.factorizing import factorize
    from qrlora_deploy.api.merging import merge, unmerge
    from qrlora_deploy.api.projecting import project, rebase
    from qrlora_deploy.api.serving import open_predictor
    from qrlora_deploy.api.training import train, train_fleet, warmup
    from qrlora_deploy.data.examples import Examples, read_examples
    from qrlora_deploy.errors import QrloraError
    from qrlora_deploy.formats.basis import Basis
    from qrlora_deploy.formats.coefficients import Coefficients
    from qrlora_deploy.integrations.pytorch import attach, coefficients_of, load_customer, remove_customer
    from qrlora_deploy.runtime.bundle.bundle import Bundle, open_bundle
    from qrlora_deploy.runtime.customers.packed import load_packed
    from qrlora_deploy.runtime.customers.store import CustomerStore
    from qrlora_deploy.runtime.host.devices import Device
    from qrlora_deploy.runtime.prediction.predictor import Prediction, Predictor
    from qrlora_deploy.runtime.sessions.buckets import Buckets
    from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
    from qrlora_deploy.runtime.verification.parity import ParityReport, verify
    from qrlora_deploy.training.settings import default_rate

__all__ = [
    "Basis",
    "Buckets",
    "Bundle",
    "Coefficients",
    "CustomerStore",
    "Device",
    "Examples",
    "ParityReport",
    "Prediction",
    "Predictor",
    "QrloraError",
    "SwitchableSession",
    "__version__",
    "attach",
    "coefficients_of",
    "combine",
    "convert",
    "default_rate",
    "export",
    "factorize",
    "load_customer",
    "load_packed",
    "merge",
    "open_bundle",
    "open_predictor",
    "project",
    "read_examples",
    "rebase",
    "remove_customer",
    "train",
    "train_fleet",
    "unmerge",
    "verify",
    "warmup",
]

_PLACES = {
    "api.combining": ("combine",),
    "api.converting": ("convert",),
    "api.exporting": ("export",),
    "api.factorizing": ("factorize",),
    "api.merging": ("merge", "unmerge"),
    "api.projecting": ("project", "rebase"),
    "api.serving": ("open_predictor",),
    "api.training": ("train", "train_fleet", "warmup"),
    "data.examples": ("Examples", "read_examples"),
    "errors": ("QrloraError",),
    "formats.basis": ("Basis",),
    "formats.coefficients": ("Coefficients",),
    "integrations.pytorch": ("attach", "coefficients_of", "load_customer", "remove_customer"),
    "runtime.bundle.bundle": ("Bundle", "open_bundle"),
    "runtime.customers.packed": ("load_packed",),
    "runtime.customers.store": ("CustomerStore",),
    "runtime.host.devices": ("Device",),
    "runtime.prediction.predictor": ("Prediction", "Predictor"),
    "runtime.sessions.buckets": ("Buckets",),
    "runtime.sessions.switchable": ("SwitchableSession",),
    "runtime.verification.parity": ("ParityReport", "verify"),
    "training.settings": ("default_rate",),
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


_moved.install()
