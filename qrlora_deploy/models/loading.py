"""Making models out of a folder: on the meta device, or with their weights; never with made-up ones."""

import copy
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from qrlora_deploy.errors import InputError, library_errors
from qrlora_deploy.models.completeness import compare, describe, listed, wrapper
from qrlora_deploy.models.weight_files import StoredTensor

LOADING = frozenset({"attn_implementation", "device_map", "dtype", "ignore_mismatched_sizes"})
"""Options of `from_pretrained` that say how to load; others are fields of the config."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence remarks and bars: tensors that are newly drawn and not meant are refused, not remarked on."""
    before, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.logging.enable_progress_bar()


def make_skeleton(folder: Path, config: Any, kind: Any, **options: Any) -> Any:
    """A model of the class `kind` on the meta device: all modules, no memory.

    Args:
        folder: of the checkpoint, for messages.
        config: its config, which is not changed.
        kind: a class of transformers.
        options: fields of the config that differ.

    Raises:
        FileFormatError: transformers makes no model of the config.
    """
    with library_errors(f"{folder}/config.json makes no {kind.__name__}"), quiet_transformers(), torch.device("meta"):
        model = kind(_changed(config, options))
        model.tie_weights()
        return model


def load_weights(folder: Path, config: Any, kind: Any, meant: Container[str] = (), **options: Any) -> Any:
    """A model of the class `kind` in evaluation mode with the weights of `folder`.

    Args:
        folder: of the checkpoint.
        config: its config, which is not changed.
        kind: a class of transformers.
        meant: names of the tensors that may be missing and are newly drawn.
        options: of `from_pretrained`, or fields of the config that differ.

    Raises:
        InputError: transformers cannot load it, would draw tensors that are not meant, or a weight is NaN or Inf.
    """
    model, missing = _load(folder, config, kind, options)
    made_up = [name for name in missing if name not in meant]
    if made_up:
        raise InputError(f"{folder} lacks {len(made_up)} tensors of {kind.__name__}: {listed(made_up)}")
    wrong = [name for name, parameter in model.named_parameters() if name not in meant and not _is_finite(parameter)]
    if wrong:
        raise InputError(f"{folder}: weights hold NaN or Inf: {listed(wrong)}; give the last checkpoint without")
    return model.eval()


def _is_finite(values: torch.Tensor) -> bool:
    # The ends alone, which a NaN reaches: no copy of an embedding is made.
    if values.is_meta or not values.numel():
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(values.detach()))


def check_whole(
    name: str, folder: Path, model: Any, stored: Mapping[str, StoredTensor], meant: Container[str] = ()
) -> None:
    """Make sure that files hold every tensor of a model, by their headers.

    Args:
        name: of the checkpoint, for messages.
        folder: of it.
        model: on the meta device.
        stored: what the headers say, by the name of the tensor.
        meant: tensors that may be missing or have other shapes.

    Raises:
        InputError: others are missing or have other shapes; they are named.
    """
    found = compare(model, stored).without(meant)
    if found.missing and found.unused and wrapper(found) is None:
        # transformers may find them by renaming and joining others; no weight is kept for the answer.
        _model, missing = _load(
            folder, model.config, type(model), {"device_map": "meta", "ignore_mismatched_sizes": True}
        )
        found = replace(found, missing=tuple(name for name in missing if name not in meant))
    problem = describe(found, stored, model)
    if problem:
        raise InputError(f"{name} is no whole {type(model).__name__}: {problem}")


def _load(folder: Path, config: Any, kind: Any, options: dict[str, Any]) -> tuple[Any, list[str]]:
    fields = {name: value for name, value in options.items() if name not in LOADING}
    chosen = {name: value for name, value in options.items() if name in LOADING}
    with library_errors(f"{folder} cannot be loaded as {kind.__name__}", InputError), quiet_transformers():
        model, found = kind.from_pretrained(
            folder,
            config=_changed(config, fields),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **{"dtype": torch.float32} | chosen,
        )
    return model, sorted(found["missing_keys"])


def _changed(config: Any, fields: dict[str, Any]) -> Any:
    changed = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
