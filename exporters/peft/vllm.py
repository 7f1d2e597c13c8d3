"""What vLLM's LoRA loader takes: its rules in version 0.33, `vllm/lora/peft_helper.py` and `vllm/config/lora.py`.

Rank and scaling of a layer are `r` and `lora_alpha / r`, or what `rank_pattern` and `alpha_pattern` say, which earlier
versions do not read: the scaling is 1 in our folders either way, and a layer of a smaller rank than `r` is filled up
with zeros. It takes neither biases nor DoRA nor layers in `modules_to_save`.
"""

from collections.abc import Mapping
from typing import Any

from qrlora_deploy.errors import argument

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""


def max_lora_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` that takes layers of `rank`; None: there is none."""
    return next((most for most in MAX_RANKS if rank <= most), None)


def vllm_refusal(writes_text: bool, config: Mapping[str, Any]) -> str:
    """Why vLLM does not take a folder with this `adapter_config.json`; empty: it does.

    Args:
        writes_text: whether the base is a decoder.
        config: as it is written.
    """
    if not writes_text:
        return "vLLM takes customers of decoders alone, which write text"
    if config["modules_to_save"]:
        return f"vLLM takes no layers of a customer's own, such as {config['modules_to_save'][0]}"
    if max_lora_rank(config["r"]) is None:
        return (
            f"vLLM takes ranks up to {MAX_RANKS[-1]}, and this basis has one of {config['r']}; make one with a smaller "
            f"{argument('tau')} or {argument('rank')}"
        )
    return ""


def vllm_text(refusal: str, config: Mapping[str, Any]) -> str:
    """Lines of the README; empty where vLLM does not take the folder."""
    if refusal:
        return ""
    most = max_lora_rank(config["r"])
    return f"\nvLLM: `vllm serve BASE --enable-lora --max-lora-rank {most} --lora-modules NAME=FOLDER`.\n"
