"""A base model on disk: its config, its tensors one at a time, and their digests."""

from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from qrlora_deploy.deprecated.moved import names_of
from qrlora_deploy.errors import InputError, library_errors
from qrlora_deploy.models.capacity import check_ids
from qrlora_deploy.models.completeness import is_head
from qrlora_deploy.models.hub import fetch_snapshot
from qrlora_deploy.models.loading import check_whole, load_weights, make_skeleton
from qrlora_deploy.models.model_config import CONFIG, class_for, is_encoder, load_config, model_class
from qrlora_deploy.models.output_names import output_names
from qrlora_deploy.models.sentence_modules import read_pooling
from qrlora_deploy.models.support import check_head, check_padding, check_supported
from qrlora_deploy.models.task_head import check_task_head, task_of
from qrlora_deploy.models.tokenizer_files import has_tokenizer, read_tokenizer
from qrlora_deploy.models.weight_files import StoredTensor, digest_of, read_headers, weight_files
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.registry import TASKS, has_task_head, writes_text

__getattr__ = names_of("qrlora_deploy.models.basis_fit", here=__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint in safetensors; nothing is read before it is asked for.

    Attributes:
        folder: where the files are.
        name: folder or hub name as the user gave it.
        wanted: name of the task that the model is taken for where its config leaves that open; empty: nobody said so.
    """

    folder: Path
    name: str
    wanted: str = ""

    def taken_for(self, task: str) -> "Checkpoint":
        """The same, taken for a task where its config leaves the task open; what was read of it is not read again."""
        taken = replace(self, wanted=task)
        vars(taken).update(vars(self) | {"wanted": task})  # nothing that is kept depends on the task
        return taken

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        return load_config(self.folder)

    @cached_property
    def model_class(self) -> Any:
        """The class of the model, as its config names it."""
        return model_class(self.folder, self.config)

    def class_for(self, task: Task) -> Any:
        """transformers' class of models of this config for a task.

        Raises:
            InputError: there is none.
        """
        found = class_for(self.config, task.model_class)
        if found is None:
            raise InputError(
                f"{self.name} cannot become a {task.name}: transformers has no {task.model_class} of model type "
                f"{self.config.model_type!r}"
            )
        return found

    @property
    def architecture(self) -> str:
        """Class name of the model, such as `BertForSequenceClassification`."""
        return str(self.model_class.__name__)

    @property
    def has_task_head(self) -> bool:
        """Whether the checkpoint can classify or regress as it is."""
        return has_task_head(self.architecture)

    @property
    def writes_text(self) -> bool:
        """Whether the checkpoint is a decoder with the head that it writes text by."""
        return writes_text(self.architecture)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs; none where there is no task head."""
        return output_names(self.folder / CONFIG, self.config.id2label) if self.has_task_head else ()

    @property
    def task(self) -> str:
        """The name of the head's task.

        Raises:
            InputError: there is none, or another one than is supported.
        """
        self.require_task_head()
        return task_of(self.config, self.architecture, len(self.labels), self.wanted)

    def require_task_head(self, task: str = "") -> None:
        """Make sure that there is a supported task head, or that an encoder without is what a task needs.

        Args:
            task: name of the task; empty: the one that the model is taken for.

        Raises:
            InputError: as `check_task_head`, or the head answers with several numbers a text.
        """
        self._check_kind()
        check_task_head(self.name, self.config, self.architecture, task or self.wanted)

    def check_base(self) -> None:
        """Make sure that a basis of these weights can be used: a model of a task, or an encoder that can become one.

        Raises:
            InputError: it is neither, or is not supported or not whole.
        """
        self._check_kind()
        if not self.has_task_head and not self.writes_text and not is_encoder(self.architecture):
            raise InputError(
                f"{self.name} is a {self.architecture}, whose head is for another task; give it a task head with "
                f"`warmup` first and factorize the result"
            )
        self.check_usable()
        if has_tokenizer(self.folder):
            # Training and export would refuse these: better now, before they are paid for.
            check_ids(self.name, self.skeleton(), self.tokenizer(), pairs=False)
            if self.has_task_head:
                check_padding(self.name, self.skeleton(), self.tokenizer())

    def check_family(self) -> None:
        """Refuse, by an InputError, a family of models that does not work the whole way."""
        if not self.writes_text and all(
            class_for(self.config, task.model_class) is None for task in TASKS if task.has_labels
        ):
            raise InputError(
                f"{self.name} cannot become a text classifier: transformers has none of model type "
                f"{self.config.model_type!r}, so it cannot be a base"
            )
        check_supported(self.name, self.skeleton())

    def _check_kind(self) -> None:
        self.check_family()
        if self.has_task_head:
            check_head(self.name, self.config.problem_type, len(self.labels))

    def check_usable(self) -> None:
        """Make sure that the files hold the model that the config describes: nothing is made up when it is loaded.

        Raises:
            InputError: the base is quantised, or tensors are missing or have other shapes; they are named.
        """
        self.check_plain()
        self._check_complete  # noqa: B018 - once

    def check_plain(self) -> None:
        """Refuse a base whose config.json says that it is quantised, by an InputError."""
        if getattr(self.config, "quantization_config", None):
            raise InputError(
                f"{self.name} is quantised: {self.folder}/config.json has a quantization_config; take the "
                f"unquantised base, and quantise the merged result"
            )

    @cached_property
    def _check_complete(self) -> None:
        self.check_holds(self.skeleton(), self._unused)

    @property
    def _unused(self) -> list[str]:
        """Tensors that may be missing: nobody uses another head than a task's, and encoders are often saved without
        their pooler."""
        if self.has_task_head or self.writes_text:
            return []
        model = self.skeleton()
        return [name for name in model.state_dict() if is_head(model, name)]

    def check_holds(self, model: Any, meant: Container[str] = ()) -> None:
        """Make sure that the files hold every tensor of a model, by their headers.

        Args:
            model: on the meta device, of this config.
            meant: tensors that may be missing or have other shapes.

        Raises:
            InputError: others are missing or have other shapes; they are named.
        """
        check_whole(self.name, self.folder, model, self.stored, meant)

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """What the headers say of every tensor, by its name."""
        return read_headers(self.shards)

    @property
    def tensor_files(self) -> dict[str, Path]:
        """The file of every tensor, by tensor name."""
        return {name: tensor.file for name, tensor in self.stored.items()}

    @cached_property
    def shards(self) -> list[Path]:
        """The safetensors files, in order of their names, as `weight_files` chooses them."""
        return weight_files(self.folder)

    def read(self, tensor: str) -> torch.Tensor:
        """One tensor as it is stored."""
        with safetensors.safe_open(self.stored[tensor].file, framework="pt") as file:
            return file.get_tensor(tensor)

    def tensor_of(self, module_path: str, model: Any = None) -> str:
        """Name of the weight tensor of a layer, whether or not the files use the model's prefix.

        Args:
            module_path: of the layer.
            model: that has it; None: the checkpoint's own.

        Raises:
            InputError: the checkpoint has no such tensor.
        """
        model = self.skeleton() if model is None else model
        prefix = model.base_model_prefix
        bare = module_path.removeprefix(f"{prefix}.")
        for name in (f"{module_path}.weight", f"{bare}.weight", f"{prefix}.{bare}.weight"):
            if name in self.stored:
                return name
        if any(name in (module_path, bare, f"{prefix}.{bare}") for name, _module in model.named_modules()):
            self.check_holds(model)  # names what is missing, if anything is
            raise InputError(
                f"{self.folder}: the weight of {module_path} is stored under other names, which transformers converts "
                f"when it loads them; such a base is not supported"
            )
        raise InputError(f"{self.folder} holds no weight for the layer {module_path}")

    def tensor_digest(self, tensor: str) -> str:
        """SHA-256 of the stored bytes of one tensor; each is hashed once."""
        if tensor not in self._digests:
            self._digests[tensor] = self.stored[tensor].digest()
        return self._digests[tensor]

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all tensors, in order of their names."""
        return digest_of({name: self.tensor_digest(name) for name in self.stored})

    def skeleton(self) -> nn.Module:
        """The model on the meta device: all modules, no memory."""
        return self._skeleton

    @cached_property
    def _skeleton(self) -> nn.Module:
        return make_skeleton(self.folder, self.config, self.model_class)

    def load_model(self, **options: Any) -> Any:
        """The model in evaluation mode, fp32 on the CPU unless `options` differ.

        Args:
            options: of `from_pretrained`, or fields of the config.

        Raises:
            InputError: the base is quantised, or tensors are missing or have other shapes.
        """
        self.check_usable()
        if not self.has_task_head and not self.writes_text:
            options = read_pooling(self.folder).config_fields() | options
        return load_weights(self.folder, self.config, self.model_class, self._unused, **options)

    def tokenizer(self) -> Any:
        """The tokenizer saved with the model, as `read_tokenizer` reads it."""
        return read_tokenizer(self.folder)


def open_checkpoint(name: str) -> Checkpoint:
    """Find a checkpoint: a folder, or the name of a hub repository, of which weights, JSON and texts are fetched.

    Raises:
        InputError: there is no such folder or repository.
    """
    folder = Path(name)
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise InputError(f"{name[:80]} is no name of a checkpoint: {error.strerror}") from error
    if is_folder:
        with library_errors(f"{folder} cannot be read", InputError):
            has_config = (folder / CONFIG).is_file()
        if not has_config:
            raise InputError(f"{name} is not a checkpoint: it holds no config.json")
        return Checkpoint(folder, name)
    if name.count("/") > 1 or name.startswith((".", "/")) or folder.is_file():
        raise InputError(f"{name}: no such folder")
    return Checkpoint(fetch_snapshot(name), name)
