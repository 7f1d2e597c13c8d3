"""What vLLM's LoRA loader takes: its rules in version 0.33, `vllm/lora/peft_helper.py` and `vllm/config/lora.py`.

It reads `r` and `lora_alpha` and no patterns: the scaling is `lora_alpha / r` for every layer, which is 1 in our folders,
and a layer of a smaller rank than `r` is filled up with zeros. It takes neither biases nor `modules_to_save` nor DoRA.
"""

from collections.abc import Mapping
from typing import Any

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
            f"vLLM takes ranks up to {MAX_RANKS[-1]}, and this basis has one of {config['r']}; make one with a smaller tau "
            "or rank"
        )
    return ""


def vllm_text(refusal: str, config: Mapping[str, Any]) -> str:
    """Lines of the README; empty where vLLM does not take the folder."""
    if refusal:
        return ""
    most = max_lora_rank(config["r"])
    return f"\nvLLM: `vllm serve BASE --enable-lora --max-lora-rank {most} --lora-modules NAME=FOLDER`.\n"
