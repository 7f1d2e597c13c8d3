"""The exporter "peft": a customer as a LoRA folder that the library PEFT loads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qrlora_deploy.exporting.job import ExportJob


@dataclass(frozen=True)
class PeftOptions:
    """The exporter "peft" has no options: a LoRA folder is in fp32 and has the customer's own head."""


class PeftExporter:
    """A customer as a LoRA folder."""

    name = "peft"
    options = PeftOptions
    output: Literal["file", "folder"] = "folder"
    needs_customer: bool | None = True
    shown = ("kind", "task", "labels")

    def export(self, job: ExportJob, options: PeftOptions) -> Mapping[str, Any]:
        """See `export_peft`."""
        from exporters.peft.lora_folder import export_peft

        return export_peft(job)


EXPORTER = PeftExporter()
