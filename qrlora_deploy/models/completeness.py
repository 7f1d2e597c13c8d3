"""Whether a checkpoint's files hold every tensor of its model, by names and shapes alone.

transformers fills what is missing with random numbers and says so in a remark.
"""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qrlora_deploy.models.weight_files import StoredTensor

DERIVED = ("position_ids", "inv_freq", "num_batches_tracked")
"""Ends of the names of buffers that a model computes itself, and that older versions stored."""

LEGACY = ((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"))
"""Names that transformers still reads."""

WRAPPERS = {
    "_orig_mod.": "torch.compile; save `model._orig_mod` instead of the compiled model",
    "_fsdp_wrapped_module.": "FSDP; save a full state dict of the whole model",
    "_checkpoint_wrapped_module.": "activation checkpointing; save the model before it is wrapped",
    "base_model.model.": "PEFT; save what `merge_and_unload()` returns",
    "module.": "DataParallel and DistributedDataParallel; save `model.module` instead of the wrapped model",
}
"""What puts a prefix before names, and how to save without it."""


@dataclass(frozen=True)
class Comparison:
    """What a model needs against what is stored.

    Attributes:
        total: how many tensors the model needs.
        missing: those that no file holds, by the model's names.
        other_shapes: name in the file and the shape that the model has instead, by the model's names.
        twice: tensors that are stored under two names each, as "a and b".
        unused: stored under names that the model does not have.
        no_floats: stored as what is no floating-point number, by the names in the files; transformers would
            convert each value and know of no scale.
    """

    total: int
    missing: tuple[str, ...]
    other_shapes: dict[str, tuple[str, tuple[int, ...]]]
    twice: tuple[str, ...]
    unused: tuple[str, ...]
    no_floats: tuple[str, ...]

    def without(self, meant: Container[str]) -> "Comparison":
        """The same, but for tensors that may be missing or have other shapes."""
        missing = tuple(name for name in self.missing if name not in meant)
        shapes = {name: pair for name, pair in self.other_shapes.items() if name not in meant}
        return replace(self, missing=missing, other_shapes=shapes)


def compare(model: Any, stored: Mapping[str, StoredTensor]) -> Comparison:
    """Hold the tensors of `model`, which may live on the meta device, against headers.

    The model's own prefix may be there or not, as transformers reads both. Of tied weights one is enough.
    """
    state = model.state_dict(keep_vars=True)
    sources: dict[str, list[str]] = {}
    unused = []
    for name in stored:
        key = _key(name, state, model.base_model_prefix)
        if key is None:
            unused.append(name)
        else:
            sources.setdefault(key, []).append(name)
    twice = tuple(" and ".join(sorted(names)) for names in sources.values() if len(names) > 1)
    found = {id(state[key]) for key in sources}
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [
        key
        for key, tensor in state.items()
        if id(tensor) not in found
        and not key.endswith(DERIVED)
        and not any(pattern.search(key) for pattern in optional)
    ]
    shapes = {
        key: (names[0], tuple(state[key].shape))
        for key, names in sources.items()
        if stored[names[0]].shape != tuple(state[key].shape)
    }
    no_floats = tuple(
        names[0] for key, names in sources.items() if state[key].is_floating_point() and stored[names[0]].quantised
    )
    return Comparison(len(state), tuple(missing), shapes, twice, tuple(unused), no_floats)


def _key(name: str, state: Mapping[str, Any], prefix: str) -> str | None:
    """The model's name of the tensor that is stored as `name`."""
    for pattern, modern in LEGACY:
        name = pattern.sub(modern, name)
    for key in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if key in state:
            return key
    return None


def is_head(model: Any, name: str) -> bool:
    """Whether a tensor is the head's. The pooler stands between encoder and head and is often newly initialised."""
    prefix, parts = model.base_model_prefix, name.split(".")
    # An encoder without a head has no module of its own prefix.
    return "pooler" in parts or (hasattr(model, prefix) and parts[0] != prefix)


def describe(found: Comparison, stored: Mapping[str, StoredTensor], model: Any) -> str | None:
    """What is wrong, and what to do about it; None where the files hold the whole model."""
    if found.missing:
        advice = wrapper(found) or _prefix(found)
        if advice is None and all(is_head(model, name) for name in found.missing):
            advice = "give it a head with `warmup` first"
        return f"{len(found.missing)} of its {found.total} tensors are missing: {listed(found.missing)}" + (
            f"; {advice}" if advice else ""
        )
    if found.twice:
        return f"its files hold {listed(found.twice)}, of which the model has one"
    if found.no_floats:
        first = stored[found.no_floats[0]]
        return f"{found.no_floats[0]} is stored as {first.dtype} {list(first.shape)}; an unquantised base is needed"
    if found.other_shapes:
        shown = [
            f"{name} is {list(stored[name].shape)}, but {list(shape)} by config.json"
            for name, shape in found.other_shapes.values()
        ]
        labels = model.config.num_labels
        heads = [name for name, pair in found.other_shapes.items() if is_head(model, name) and pair[1][:1] == (labels,)]
        advice = f"; id2label in config.json has to name as many labels as the head has, not {labels}" if heads else ""
        return f"tensors have other shapes: {listed(shown, 3)}{advice}"
    return None


def wrapper(found: Comparison) -> str | None:
    """The wrapper of PyTorch that put a prefix before the names in the files, and the remedy; or None."""
    for prefix, remedy in WRAPPERS.items():
        if any(f".{prefix}" in f".{name}" for name in found.unused):
            return f"the names in the files have the prefix {prefix} of {remedy}"
    return None


def _prefix(found: Comparison) -> str | None:
    ends = {name.split(".", 1)[1]: name.split(".", 1)[0] for name in found.unused if "." in name}
    wanted = {part for key in found.missing for part in (key, key.split(".", 1)[-1])}
    before = {ends[key] for key in wanted & ends.keys()}
    return f"the names in the files begin with {min(before)}.; save the transformers model itself" if before else None


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first of many names, and how many more there are."""
    known = list(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")
