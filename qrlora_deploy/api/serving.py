"""From a bundle to answers; needs neither PyTorch nor transformers."""

import os
from pathlib import Path

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.bundle.bundle import Bundle, open_bundle
from qrlora_deploy.runtime.customers.store import CustomerStore
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.prediction.predictor import Predictor
from qrlora_deploy.runtime.sessions.buckets import Buckets


def open_predictor(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    customers: str | os.PathLike[str] | None = None,
    provider: str | Device = "cpu",
    threads: int | None = None,
    buckets: Buckets | None = None,
) -> Predictor:
    """Open a bundle to answer texts.

    Files of `customers` are read when a customer is asked for the first time. To follow changes of the folder, leave
    it out and use a store: `with qr.CustomerStore(predictor.switchable, "customers"):`.

    Args:
        bundle: the folder, which is checked whole, or an open bundle.
        customers: folder of coefficients files, `<customer>.safetensors`, of a switchable bundle.
        provider: "cpu", "cuda", "cuda:1" or "tensorrt", or a `Device` with options; refused, not replaced, where it
            does not load.
        threads: threads within an operator; None leaves the choice to ONNX Runtime.
        buckets: run in these shapes only; on CUDA as captured graphs.

    Returns:
        What answers; safe for many threads.

    Raises:
        InputError: it is no bundle, there is no folder `customers`, or the bundle is merged and takes none.
        FileFormatError: a file of the bundle is damaged or was changed.
        ProviderError: the provider does not load.

    Examples:
        >>> predictor = qr.open_predictor("bundle", customers="customers")
        >>> answers = predictor.predict(["book a flight", "play some music"], customers=["acme", None])
        >>> answers[0].label in qr.Coefficients.load("customers/acme.safetensors").labels
        True
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if customers is not None and opened.manifest.kind != "switchable":
        raise InputError(f"{opened.folder} is a {opened.manifest.kind} bundle and takes no customers")
    if customers is not None and not Path(customers).is_dir():
        # Said before the graph is opened, which takes longer.
        raise InputError(f"customers: {customers}: no such folder")
    predictor = Predictor(opened, provider, threads, buckets)
    if customers is not None and predictor.switchable is not None:
        CustomerStore(predictor.switchable, customers)
    return predictor
