"""Which layers of a base are adapted, and with what ranks, by the headers of its files alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.formats.basis import FORMAT, weight_digests
from qrlora_deploy.formats.config_file import MAX_BYTES
from qrlora_deploy.inspection.recorded import Recorded
from qrlora_deploy.io.files import has_format
from qrlora_deploy.io.reading import parse_json, read_text
from qrlora_deploy.models.families import BLOCK, of_type
from qrlora_deploy.models.weight_files import StoredTensor, read_headers


@dataclass(frozen=True)
class Layer:
    """A weight that is adapted: `[out, width]`, of which `rank` directions are kept."""

    out: int
    width: int
    rank: int


def linear_layers(stored: Mapping[str, StoredTensor], config_file: Path) -> dict[str, tuple[int, int]]:
    """Shapes of the weights that `factorize` takes where it is not told which, by module path.

    Args:
        stored: headers of the base.
        config_file: its `config.json`, by which layers are known that a switchable bundle cannot have.

    Raises:
        InputError: there are none.
    """
    config = SimpleNamespace(**parse_json(read_text(config_file, MAX_BYTES), f"{config_file} is not JSON"))
    family = of_type(getattr(config, "model_type", None))
    shared = set(family.shared.names(config)) if family is not None and family.shared is not None else set()
    found = {
        path: (tensor.shape[0], tensor.shape[1])
        for name, tensor in stored.items()
        if (path := name.removesuffix(".weight")) != name
        and BLOCK.search(f".{path}")
        and len(tensor.shape) == 2
        and not tensor.quantised
        and path.rsplit(".", 1)[-1] not in shared
    }
    if not found:
        raise InputError(f"{config_file.parent} has no linear layers in numbered blocks; nothing to adapt")
    return found


def estimated(weights: Mapping[str, tuple[int, int]], rank: int | None, figures: Recorded) -> tuple[list[Layer], str]:
    """Layers with the ranks that a plan takes for theirs, and how it came to them in words.

    Args:
        weights: shapes, from `linear_layers`.
        rank: of every layer; None: what tau 0.5 is known to keep.
        figures: what is known.
    """
    if rank is not None:
        return [Layer(*shape, min(rank, *shape)) for shape in weights.values()], f"rank {rank} of every linear layer"
    share = figures.kept_share
    layers = [Layer(*shape, max(1, math.ceil(share * min(shape)))) for shape in weights.values()]
    known = ", ".join(dict.fromkeys(item.model for item in figures.ranks))
    return layers, f"estimated: tau 0.5 keeps {share:.0%} of the directions at most of {known}"


def layers_of_basis(path: Path, stored: Mapping[str, StoredTensor]) -> list[Layer]:
    """The layers of a basis file, by its header; of the base the bytes of the first and the last layer are compared.

    Args:
        path: the file.
        stored: headers of the base.

    Raises:
        InputError: it is no basis, or is damaged.
        BasisMismatchError: the base has no such layers, or has other weights in them.
    """
    if not has_format(FORMAT)(path):
        raise InputError(f"{path} is not a basis file")
    factors = read_headers([path])
    layers = []
    for name in (name.removesuffix(".Q") for name in factors if name.endswith(".Q")):
        q, r = factors[f"{name}.Q"].shape, factors.get(f"{name}.R", factors[f"{name}.Q"]).shape
        weight = stored.get(f"{name}.weight")
        if len(q) != 2 or len(r) != 2 or q[1] != r[0]:
            raise InputError(f"{path} is damaged: the factors of {name} do not fit each other")
        # Some layers keep their weight the other way around.
        if weight is None or sorted(weight.shape) != sorted((q[0], r[1])):
            raise BasisMismatchError(f"{path} has a layer {name} of {q[0]} x {r[1]}, which the base has not")
        layers.append(Layer(q[0], r[1], q[1]))
    if not layers:
        raise InputError(f"{path} is damaged: it holds no factors")
    _check_weights(path, stored)
    return layers


def _check_weights(path: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Compare two layers: reading all of a large base would take longer than a plan may."""
    digests = weight_digests(path)
    for name in dict.fromkeys((next(iter(digests)), next(reversed(digests)))):
        weight = stored.get(f"{name}.weight")
        if weight is not None and weight.digest() != digests[name]:
            raise BasisMismatchError(
                f"{path} was made from other weights than this base's: those of {name} differ; give the base it was "
                f"made from"
            )
