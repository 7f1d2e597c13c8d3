"""A customer as a folder that PEFT opens: kilobytes, as the basis stays a file of its own."""

from pathlib import Path

import numpy as np
import safetensors.numpy

from qrlora_deploy.api.inputs import StrPath, customer_with_basis
from qrlora_deploy.api.sources import base_of
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients, recorded_place
from qrlora_deploy.integrations.peft.config import CONFIG_FILE, QRLoRAConfig
from qrlora_deploy.integrations.peft.model import PREFIX
from qrlora_deploy.io.files import atomic_folder, write_json
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.merging.arithmetic import check_head, plan_folds
from qrlora_deploy.models.adapter import resolve_layer
from qrlora_deploy.models.checkpoint import Checkpoint

WEIGHTS_FILE = "adapter_model.safetensors"
INSIDE = "base_model.model"
"""What PEFT puts before every module path of the base: its own model, and its tuner inside."""


def write_adapter(
    base: StrPath | Checkpoint | None,
    basis: StrPath | Basis | None,
    coefficients: StrPath | Coefficients,
    output: StrPath,
) -> None:
    """Write a customer as an adapter of the method QRLORA: `adapter_config.json` and `adapter_model.safetensors`.

    The folder remembers where the basis is, as seen from itself.

    Args:
        base: folder or hub name; None where a coefficients file remembers one that is found.
        basis: a file, or a `Basis` that was read from one or saved; None as for `base`.
        coefficients: the customer: a file or `Coefficients`.
        output: the new folder, which must not hold anything yet; folders above it are made.

    Raises:
        InputError: the basis has no file, the customer's head does not fit the base, or `output` exists.
        BasisMismatchError: base, basis and customer do not belong together.
        QrloraError: the disk is full.
    """
    place = Path(output)
    place.parent.mkdir(parents=True, exist_ok=True)
    check_free_folder(place)
    frozen, customer = customer_with_basis(basis, coefficients)
    if frozen.file is None:
        raise InputError("basis: save it first; an adapter names the file of its basis")
    checkpoint = base_of(base, coefficients)
    model = checkpoint.skeleton()
    plan_folds(checkpoint, frozen, customer, model)  # for its checks
    check_head(checkpoint, customer)
    parts = frozen.split(customer.values)
    tensors = {f"{INSIDE}.{resolve_layer(model, name)[0]}.{PREFIX}c": values for name, values in parts.items()}
    tensors |= {f"{INSIDE}.{name}": array for name, array in customer.head.items()}
    config = QRLoRAConfig(
        base_model_name_or_path=checkpoint.name,
        inference_mode=True,
        basis_file=str(frozen.file),
        basis_digest=frozen.digest,
        modules_to_save=sorted({name.rpartition(".")[0] for name in customer.head}) or None,
        labels=list(customer.labels),
        task=customer.task,
    )
    with atomic_folder(place) as folder:
        # As seen from the folder's own place: this one is not that yet.
        seen = recorded_place(frozen.file, place / CONFIG_FILE)
        write_json(folder / CONFIG_FILE, config.to_dict() | {"basis_file": seen})
        content = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        (folder / WEIGHTS_FILE).write_bytes(safetensors.numpy.save(content, {"format": "pt"}))
