"""The exporter "peft": a customer as a LoRA folder that the library PEFT loads."""

from collections.abc import Mapping
from typing import Any, Literal

from exporters.peft.options import PeftOptions
from qrlora_deploy.exporting.job import ExportJob


class PeftExporter:
    """A customer as a LoRA folder."""

    name = "peft"
    options = PeftOptions
    output: Literal["file", "folder"] = "folder"
    needs_customer: bool | None = True
    shown = ("kind", "task", "labels", "vllm")

    def export(self, job: ExportJob, options: PeftOptions) -> Mapping[str, Any]:
        """See `export_peft`."""
        from exporters.peft.lora_folder import export_peft

        return export_peft(job, options)


EXPORTER = PeftExporter()
