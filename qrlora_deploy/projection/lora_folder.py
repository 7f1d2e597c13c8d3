"""A LoRA folder of the library PEFT as updates by layer; PEFT itself is not needed."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file

from qrlora_deploy.errors import FileFormatError, InputError, library_errors
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.io.reading import is_file, parse_json, read_text
from qrlora_deploy.io.strict import from_value
from qrlora_deploy.projection.least_squares import LowRankUpdate

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
MAX_CONFIG_BYTES = 2**22
MAX_ALPHA = 1e30
"""Beyond any that is meant, and its square is a number."""
Alpha = Annotated[float, Field(ge=-MAX_ALPHA, le=MAX_ALPHA, allow_inf_nan=False)]


class _Config(BaseModel):
    """What of PEFT's config decides the update; what else is said is passed over."""

    peft_type: str
    r: int = Field(gt=0)
    lora_alpha: Alpha
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, Alpha] = {}


@dataclass(frozen=True)
class LoraFolder:
    """What a LoRA changes.

    Attributes:
        updates: by module path of the model.
        others: tensors that were trained as a whole, such as a head, by tensor name of the model.
        digest: SHA-256 of the file of weights.
    """

    updates: dict[str, LowRankUpdate]
    others: dict[str, torch.Tensor]
    digest: str


def is_lora_folder(folder: Path) -> bool:
    """Whether PEFT wrote an adapter to a folder."""
    return is_file(folder / CONFIG_FILE)


def read_lora(folder: Path) -> LoraFolder:
    """Read an adapter.

    Raises:
        InputError: it is of another kind than LoRA, uses DoRA or trained biases, or its weights are a pickle.
        FileFormatError: it is damaged, or holds something that is no LoRA of a linear layer.
    """
    place = folder / CONFIG_FILE
    content = parse_json(read_text(place, MAX_CONFIG_BYTES), f"{place} is not JSON")
    config = from_value(_Config, content, f"{place} is no config of a LoRA")
    _check_kind(folder, config)
    weights = folder / WEIGHTS_FILE
    if not is_file(weights):
        more = f"; {PICKLE_FILE} is a pickle, which is not read: save it again" if is_file(folder / PICKLE_FILE) else ""
        raise InputError(f"{folder} holds no {WEIGHTS_FILE}{more}")
    with library_errors(f"{weights} is damaged", FileFormatError):
        tensors = load_file(weights)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        found = FACTOR.fullmatch(bare)
        if found:
            factors.setdefault(found["path"], {})[found["part"]] = tensor
        elif ".lora_" in bare or bare.startswith("lora_"):
            raise InputError(f"{weights}: {bare} is no LoRA of a linear layer; such an adapter cannot be projected")
        else:
            others[bare] = tensor
    if not factors:
        raise FileFormatError(f"{weights} holds no LoRA")
    updates = {path: _update(weights, path, parts, config) for path, parts in factors.items()}
    return LoraFolder(updates, others, digest_file(weights))


def _check_kind(folder: Path, config: _Config) -> None:
    if config.peft_type != "LORA":
        raise InputError(f"{folder} is an adapter of kind {config.peft_type}; only LoRA can be projected")
    if config.use_dora:
        raise InputError(f"{folder} uses DoRA, which scales whole weights; only plain LoRA can be projected")
    if config.bias != "none":
        raise InputError(f"{folder} trained biases too (bias={config.bias!r}), which no customer has; train without")


def _update(weights: Path, path: str, parts: Mapping[str, torch.Tensor], config: _Config) -> LowRankUpdate:
    a, b = parts.get("A"), parts.get("B")
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise FileFormatError(f"{weights}: the factors of {path} are incomplete or do not fit each other")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise FileFormatError(f"{weights}: the factors of {path} are no floating-point numbers")
    rank = a.shape[0]
    said = _of_pattern(config.rank_pattern, path, config.r)
    if rank != said:
        raise FileFormatError(f"{weights}: {path} has rank {rank}, the config says {said}")
    alpha = _of_pattern(config.alpha_pattern, path, config.lora_alpha)
    # PEFT: alpha / r, or by rank-stabilised LoRA (Kalajdzievski 2023) alpha / sqrt(r).
    scale = alpha / (rank**0.5 if config.use_rslora else rank)
    return LowRankUpdate(_fp64(b), _fp64(a), scale)


def _fp64(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.double().numpy()
    return array


def _of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """What PEFT takes for a layer: that of the first pattern which fits the end of its path."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise FileFormatError(f"{CONFIG_FILE}: the pattern {json.dumps(pattern)[:80]} is none: {error}") from error
    return default
