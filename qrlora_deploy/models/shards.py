"""Rewriting a safetensors checkpoint shard by shard, and copying what lies beside its weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.provenance import FILE_NAME
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.weight_files import check_readable, used_index

SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm")
"""What a tokenizer and a configuration are made of. Weights in other formats would hold the base,
and code is not carried along."""

Progress = Callable[[str, int, int], None]


def copy_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy configuration, tokenizer and licence files of `checkpoint` to `folder`, and how it pools; never weights."""
    for path in sorted(checkpoint.folder.iterdir()):
        weights_index = path.name.endswith(".index.json")
        legal = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        wanted = (path.suffix in SIDE_SUFFIXES and not weights_index and path.name != FILE_NAME) or legal
        if path.is_file() and wanted and not path.name.startswith("."):
            check_readable(path)
            shutil.copyfile(path, folder / path.name)
    _copy_pooling(checkpoint, folder)


def _copy_pooling(checkpoint: Checkpoint, folder: Path) -> None:
    """The config of a sentence encoder's pooling, which `modules.json` refers to by its folder."""
    for path in sorted(checkpoint.folder.glob("*_Pooling/config.json")):
        check_readable(path)
        (folder / path.parent.name).mkdir()
        shutil.copyfile(path, folder / path.parent.name / path.name)


def copy_weights(checkpoint: Checkpoint, folder: Path, progress: Progress | None = None) -> None:
    """Copy the shards and their index to `folder`, byte for byte."""
    for done, shard in enumerate(checkpoint.shards):
        if progress:
            progress("copying weights", done, len(checkpoint.shards))
        shutil.copyfile(shard, folder / shard.name)
    index = used_index(checkpoint.folder)
    if index is not None:
        shutil.copyfile(index, folder / index.name)
    if progress:
        progress("copying weights", len(checkpoint.shards), len(checkpoint.shards))


def rewrite_shards(
    checkpoint: Checkpoint,
    folder: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    progress: Progress | None = None,
) -> None:
    """Write every shard to `folder` under its own name, each tensor passed through `change`.

    One shard is in memory at a time. The index, where there is one, gets the new sizes.

    Raises:
        InputError: a shard cannot be read.
    """
    size_bytes = parameters = 0
    for done, shard in enumerate(checkpoint.shards):
        if progress:
            progress("writing weights", done, len(checkpoint.shards))
        try:
            with safetensors.safe_open(shard, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: change(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        except safetensors.SafetensorError as error:
            raise InputError(f"{shard} is not a complete safetensors file: {error}") from error
        safetensors.torch.save_file(tensors, folder / shard.name, metadata or {"format": "pt"})
        size_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        parameters += sum(tensor.numel() for tensor in tensors.values())
    if progress:
        progress("writing weights", len(checkpoint.shards), len(checkpoint.shards))
    _write_index(checkpoint, folder, size_bytes, parameters)


def _write_index(checkpoint: Checkpoint, folder: Path, size_bytes: int, parameters: int) -> None:
    source = used_index(checkpoint.folder)
    if source is None:
        return
    index = json.loads(source.read_text(encoding="utf-8"))
    sizes = {"total_size": size_bytes, "total_parameters": parameters}
    known = index.get("metadata")
    known = known if isinstance(known, dict) else {}
    index["metadata"] = known | {key: value for key, value in sizes.items() if key in known}
    write_json(folder / source.name, index)
