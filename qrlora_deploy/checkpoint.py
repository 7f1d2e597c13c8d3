"""A base model on disk: its config, its tensors one at a time, and their digests."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn

from qrlora_deploy.basis import Basis
from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError, first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint in safetensors; nothing is read before it is asked for.

    Attributes:
        folder: where the files are.
        name: folder or hub name as the user gave it.
    """

    folder: Path
    name: str

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        try:
            return transformers.AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise FileFormatError(f"{self.folder}/config.json cannot be used: {first_line(error)}") from error

    @property
    def architecture(self) -> str:
        """Class name of the model, such as `BertForSequenceClassification`."""
        names = getattr(self.config, "architectures", None) or [""]
        if not hasattr(transformers, names[0]) or not names[0]:
            raise InputError(f"{self.folder}/config.json: transformers has no architecture {names[0]!r}")
        return str(names[0])

    @property
    def has_task_head(self) -> bool:
        """Whether the checkpoint can classify or regress as it is."""
        return self.architecture.endswith("ForSequenceClassification")

    def require_task_head(self) -> None:
        """Make sure that there is a task head.

        Raises:
            InputError: there is none; the message says how to give it one.
        """
        if not self.has_task_head:
            raise InputError(
                f"{self.name} is a {self.architecture} without a task head; give it one with `warmup` first"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs."""
        names = self.config.id2label
        return tuple(str(names[index]) for index in range(self.config.num_labels))

    @property
    def task(self) -> str:
        """The task of the head."""
        regression = self.config.problem_type == "regression" or self.config.num_labels == 1
        return "text-regression" if regression else "text-classification"

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """The file of every tensor, by tensor name."""
        files = {}
        for shard in self.shards:
            try:
                with safetensors.safe_open(shard, framework="pt") as file:
                    files.update(dict.fromkeys(file.keys(), shard))
            except (safetensors.SafetensorError, OSError) as error:
                raise FileFormatError(f"{shard} is not a complete safetensors file: {error}") from error
        return files

    @cached_property
    def shards(self) -> list[Path]:
        """The safetensors files, in order of their names.

        Raises:
            InputError: there are none, or a shard of the index is missing or outside the folder.
        """
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise InputError(f"{self.folder} holds no {SINGLE}; only safetensors checkpoints are read")
            return [self.folder / SINGLE]
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FileFormatError(f"{index} is damaged: {error}") from error
        wrong = [name for name in names if Path(name).name != name or not (self.folder / name).is_file()]
        if wrong:
            raise InputError(f"{index} names files that are not there: {', '.join(wrong)}")
        return [self.folder / name for name in names]

    def read(self, tensor: str) -> torch.Tensor:
        """One tensor as it is stored."""
        with safetensors.safe_open(self.tensor_files[tensor], framework="pt") as file:
            return file.get_tensor(tensor)

    def tensor_of(self, module_path: str) -> str:
        """Name of the weight tensor of a layer, whether or not the files use the model's prefix.

        Raises:
            InputError: the checkpoint has no such tensor.
        """
        prefix = self.skeleton().base_model_prefix
        bare = module_path.removeprefix(f"{prefix}.")
        for name in (f"{module_path}.weight", f"{bare}.weight", f"{prefix}.{bare}.weight"):
            if name in self.tensor_files:
                return name
        raise InputError(f"{self.folder} holds no weight for the layer {module_path}")

    def tensor_digest(self, tensor: str) -> str:
        """SHA-256 of the stored bytes of one tensor."""
        data = self.read(tensor).contiguous()
        return hashlib.sha256(data.flatten().view(torch.uint8).numpy().data).hexdigest()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all tensors, in order of their names."""
        whole = hashlib.sha256()
        for name in sorted(self.tensor_files):
            whole.update(f"{name}:{self.tensor_digest(name)}\n".encode())
        return whole.hexdigest()

    def skeleton(self) -> nn.Module:
        """The model on the meta device: all modules, no memory."""
        return self._skeleton

    @cached_property
    def _skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return getattr(transformers, self.architecture)(self.config)

    def load_model(self, **options: Any) -> Any:
        """The model in evaluation mode, fp32 on the CPU unless `options` of `from_pretrained` differ."""
        model_class = getattr(transformers, self.architecture)
        model = model_class.from_pretrained(self.folder, **{"dtype": torch.float32} | options)
        return model.eval()

    def tokenizer(self) -> Any:
        """The tokenizer saved with the model.

        Raises:
            InputError: there is none.
        """
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.folder} holds no usable tokenizer: {first_line(error)}") from error
        # transformers 5 makes a tokenizer without any word where the files are missing.
        files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
        if tokenizer.vocab_files_names and not any((self.folder / name).is_file() for name in files):
            raise InputError(f"{self.folder} holds no usable tokenizer: none of {', '.join(files)} is there")
        return tokenizer


def open_checkpoint(name: str) -> Checkpoint:
    """Find a checkpoint: a folder, or the name of a hub repository (only its safetensors, JSON
    and text files are fetched).

    Raises:
        InputError: there is no such folder or repository.
    """
    folder = Path(name)
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise InputError(f"{name[:80]} is no name of a checkpoint: {error.strerror}") from error
    if is_folder:
        if not (folder / "config.json").is_file():
            raise InputError(f"{name} is not a checkpoint: it holds no config.json")
        return Checkpoint(folder, name)
    if name.count("/") > 1 or name.startswith((".", "/")) or folder.is_file():
        raise InputError(f"{name}: no such folder")
    # Imported here: most bases are folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model"]
    try:
        return Checkpoint(Path(snapshot_download(name, allow_patterns=patterns)), name)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{name} is neither a folder nor a reachable hub repository: {first_line(error)}") from error


def check_basis_fits(checkpoint: Checkpoint, basis: Basis) -> None:
    """Make sure that a basis was made from the weights of this checkpoint.

    Raises:
        BasisMismatchError: some weights differ; all of them are counted, the first ones named.
        InputError: the checkpoint has no such layer.
    """
    wrong = [
        target.name
        for target in basis.targets
        if checkpoint.tensor_digest(checkpoint.tensor_of(target.name)) != target.weight_digest
    ]
    if wrong:
        raise BasisMismatchError(
            f"the basis was made from other weights than {checkpoint.name}: {len(wrong)} of "
            f"{len(basis.targets)} targets differ ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})"
        )
