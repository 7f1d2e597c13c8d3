"""The exporter "peft": a customer as a LoRA folder that the library PEFT loads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.exporting.options import option


@dataclass(frozen=True)
class PeftOptions:
    """Options of the exporter "peft"; a LoRA folder is in fp32 and has the customer's own head.

    Attributes:
        vllm: refuse a customer that vLLM's LoRA loader does not take.
    """

    vllm: bool = option(False, "Refuse a customer that vLLM's LoRA loader does not take, saying why.")


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
