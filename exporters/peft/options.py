"""Options of the exporter "peft"; light enough for `--help`."""

from dataclasses import dataclass

from qrlora_deploy.exporting.options import option


@dataclass(frozen=True)
class PeftOptions:
    """Options of the exporter "peft"; a LoRA folder is in fp32 and has the customer's own head.

    Attributes:
        vllm: refuse a customer that vLLM's LoRA loader does not take.
    """

    vllm: bool = option(False, "Refuse a customer that vLLM's LoRA loader does not take, saying why.")
