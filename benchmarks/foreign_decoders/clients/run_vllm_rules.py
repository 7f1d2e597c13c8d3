"""vLLM's own reading of a LoRA folder: its `PEFTHelper`, taken from its wheel, without the rest of vLLM.

python run_vllm_rules.py FOLDER WHEEL
"""

import json
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

from expected import here
from safetensors import safe_open

HELPER, CONFIG = "vllm/lora/peft_helper.py", "vllm/config/lora.py"
TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"}
"""Linear layers of vLLM's decoders, and those that it packs."""


class _Silent:
    """A logger that vLLM's module can have."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_named: None


def helper_of(wheel: Path) -> tuple[Any, tuple[int, ...]]:
    """`PEFTHelper`, and what `max_lora_rank` may be."""
    with zipfile.ZipFile(wheel) as archive:
        source, config = (archive.read(name).decode() for name in (HELPER, CONFIG))
    logger = types.ModuleType("vllm.logger")
    logger.init_logger = lambda _name: _Silent()  # type: ignore[attr-defined]
    config_module = types.ModuleType("vllm.config.lora")
    config_module.LoRAConfig = object  # type: ignore[attr-defined]
    tensorizer = types.ModuleType("vllm.model_executor.model_loader.tensorizer")
    tensorizer.TensorizerConfig = object  # type: ignore[attr-defined]
    module = types.ModuleType("vllm.lora.peft_helper")
    for name in ("vllm", "vllm.config", "vllm.lora", "vllm.model_executor", "vllm.model_executor.model_loader"):
        sys.modules[name] = types.ModuleType(name)
    for one in (logger, config_module, tensorizer, module):
        sys.modules[one.__name__] = one
    exec(compile(source, HELPER, "exec"), module.__dict__)
    found = re.search(r"MaxLoRARanks = Literal\[([0-9, ]+)\]", config)
    assert found is not None
    return module.__dict__["PEFTHelper"], tuple(int(rank) for rank in found.group(1).split(","))


def problems(folder: Path, helper_class: Any, ranks: tuple[int, ...]) -> list[str]:
    """What keeps vLLM from serving a folder as PEFT does."""
    helper = helper_class.from_local_dir(str(folder), None)
    most = next((rank for rank in ranks if helper.r <= rank), None)
    if most is None:
        return [f"rank {helper.r} is beyond {ranks[-1]}"]
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=most, bias_enabled=False))
    found = []
    with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            path, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            rank, scaling = helper.get_rank_and_scaling(path)
            shape = file.get_slice(name).get_shape()
            if shape[0 if part == "lora_A" else 1] != rank or scaling != 1.0 or path.rpartition(".")[2] not in TARGETS:
                found.append(f"{name}: {shape}, of rank {rank}, scaling {scaling}")
    return found


if __name__ == "__main__":
    held = here()
    place = Path(sys.argv[2])
    rules = helper_of(place)
    for customer in held.names[1:]:
        held.note("--format peft by vLLM's rules", "; ".join(problems(held.folder / f"{customer}-peft", *rules)[:3]))
    own = json.loads((held.folder / f"{held.names[1]}-peft" / "adapter_config.json").read_text(encoding="utf-8"))
    held.note("--format peft by vLLM's rules", "" if own["bias"] == "none" else "a bias")
    held.report_with({"vllm": place.name.split("-")[1]})
