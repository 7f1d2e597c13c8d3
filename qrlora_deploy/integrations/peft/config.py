"""What `adapter_config.json` says of a customer as an adapter of PEFT."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from peft import PeftConfig

from qrlora_deploy.formats.coefficients import recorded_place


class MethodName(str):
    """The name of this method to PEFT, whose messages ask the members of its own enumeration for their `value`."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The name."""
        return str(self)


METHOD: Any = MethodName("QRLORA")
CONFIG_FILE = "adapter_config.json"


@dataclass
class QRLoRAConfig(PeftConfig):
    """The method QRLORA: which basis an adapter is of.

    Attributes:
        basis_file: the basis, relative to the current folder or absolute. The file holds it as seen from its own
            folder, so that both can be moved together.
        basis_digest: of that basis; empty: whatever the file holds, as for a new adapter.
        modules_to_save: layers that an adapter has of its own, whole: the customer's head.
        target_modules: the layers, which the basis decides; what is given here is not read.
        labels: names of the outputs, in the order of the logits; PEFT itself does not look at them.
        task: name of the task.
    """

    basis_file: str = ""
    basis_digest: str = ""
    modules_to_save: list[str] | None = None
    target_modules: list[str] | None = None
    labels: list[str] = field(default_factory=list)
    task: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = METHOD

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Self:
        """Read the config of an adapter's folder; its basis is looked for from there."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if config.basis_file and folder.is_dir():
            config.basis_file = str((folder / config.basis_file).resolve())
        return config

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the config into an adapter's folder, with the basis as seen from there."""
        here = self.basis_file
        # PEFT writes what the fields hold; where the basis is seen from the folder is for the file alone.
        self.basis_file = recorded_place(Path(here), Path(save_directory, CONFIG_FILE)) if here else ""
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.basis_file = here
