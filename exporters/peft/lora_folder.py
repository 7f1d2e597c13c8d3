"""A customer as a LoRA folder that the library PEFT loads.

`A = R` and `B = Q diag(c)`, so a customer takes the size of the factors, not of its coefficients.
PEFT itself is not needed to write it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from torch import nn

from exporters.peft.options import PeftOptions
from exporters.peft.vllm import max_lora_rank, vllm_refusal, vllm_text
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.io.files import atomic_folder, write_json
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.merging.arithmetic import check_head, plan_folds
from qrlora_deploy.models.adapter import resolve_layer
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.targets import is_conv1d
from qrlora_deploy.tasks.registry import task_named

DEFAULTS = PeftOptions()

CONFIG_FILE, WEIGHTS_FILE, README_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model"
"""What PEFT puts before every module path of the base: its own model, and its tuner inside."""

ALWAYS_SAVED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
"""By its tasks, what PEFT adds to `modules_to_save`, and demands the weights of if they exist."""


def export_peft(job: ExportJob, options: PeftOptions = DEFAULTS) -> Mapping[str, Any]:
    """The exporter "peft": adapter_config.json, adapter_model.safetensors and a README in a new folder.

    Raises:
        InputError: there is no customer, the base has no task head, PEFT cannot hold a target, or vLLM cannot where
            that is asked for, or `job.output` exists.
        BasisMismatchError: base, basis and customer do not belong together.
        QrloraError: the disk is full.
    """
    customer = job.coefficients
    if customer is None:
        raise InputError(f"{argument('format', 'peft')} writes one customer; give it by {argument('coefficients')}")
    check_free_folder(job.output)
    checkpoint, basis = job.checkpoint.taken_for(customer.task), job.basis
    checkpoint.require_task_head()
    model = checkpoint.skeleton()
    plan_folds(checkpoint, basis, customer, model)
    outputs = check_head(checkpoint, customer)
    layers = {target.name: resolve_layer(model, target.name) for target in basis.targets}
    always = ALWAYS_SAVED.get(task_named(checkpoint.task).peft_type, ())
    to_save = _modules_to_save(customer.head, always)
    saved = _saved_modules(model, (*always, *to_save))
    paths = [path for path, _layer in layers.values()]
    _check_matching(model, paths, saved)
    config = _config(checkpoint, basis, layers, to_save)
    refusal = vllm_refusal(checkpoint.writes_text, config)
    if options.vllm and refusal:
        raise InputError(f"{argument('vllm')}: {refusal}")
    tensors = _factors(basis, customer, layers) | _saved_tensors(checkpoint, model, customer, saved)
    metadata = {
        "format": "pt",
        "base_digest": checkpoint.digest,
        "basis_digest": basis.digest,
        "coefficients_digest": customer.digest,
    }
    with atomic_folder(job.output) as folder:
        write_json(folder / CONFIG_FILE, config)
        (folder / WEIGHTS_FILE).write_bytes(safetensors.numpy.save(tensors, metadata))
        readme = _readme(checkpoint, customer, outputs, job.output) + vllm_text(refusal, config)
        (folder / README_FILE).write_text(readme, encoding="utf-8")
    return {
        "kind": "peft",
        "task": customer.task,
        "labels": list(customer.labels or checkpoint.labels),
        **({"thresholds": list(customer.thresholds)} if customer.thresholds else {}),
        "targets": paths,
        "ranks": list(basis.ranks.values()),
        "modules_to_save": saved,
        **({"vllm": refusal or f"max_lora_rank {max_lora_rank(config['r'])}"} if checkpoint.writes_text else {}),
        "base_digest": checkpoint.digest,
        "basis_digest": basis.digest,
        "coefficients_digest": customer.digest,
    }


def _config(
    checkpoint: Checkpoint, basis: Basis, layers: Mapping[str, tuple[str, nn.Module]], to_save: list[str]
) -> dict[str, Any]:
    largest = max(basis.ranks.values())
    # PEFT takes the first pattern that fits the end of a path; anchored and escaped each fits one.
    ranks = {f"^{re.escape(layers[name][0])}": rank for name, rank in basis.ranks.items()}
    return {
        "peft_type": "LORA",
        "task_type": task_named(checkpoint.task).peft_type,
        "base_model_name_or_path": checkpoint.name,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        # alpha = rank everywhere, which makes the scaling alpha / rank 1.
        "alpha_pattern": ranks,
        "target_modules": [path for path, _layer in layers.values()],
        "modules_to_save": to_save or None,
        "fan_in_fan_out": all(is_conv1d(layer) for _path, layer in layers.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
    }


def _factors(
    basis: Basis, customer: Coefficients, layers: Mapping[str, tuple[str, nn.Module]]
) -> dict[str, np.ndarray]:
    """`A [rank, in]` and `B [out, rank]` of every target in fp32, `Linear` and `Conv1D` alike.

    PEFT's two factors are linear layers of their own; only folding them in turns them for `Conv1D`.
    """
    tensors = {}
    parts = basis.split(customer.values)
    for target in basis.targets:
        path = f"{PREFIX}.{layers[target.name][0]}"
        scaled = target.q.astype(np.float64) * parts[target.name].astype(np.float64)
        tensors[f"{path}.lora_A.weight"] = np.ascontiguousarray(target.r)
        tensors[f"{path}.lora_B.weight"] = np.ascontiguousarray(scaled.astype(np.float32))
    return tensors


def _modules_to_save(head: Iterable[str], always: tuple[str, ...]) -> list[str]:
    """Paths of the customer's own layers that PEFT does not save on its own account."""
    paths = sorted({name.rpartition(".")[0] for name in head})
    return [path for path in paths if not set(path.split(".")) & set(always)]


def _saved_modules(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Paths of the modules that PEFT takes from the folder whole: those whose path ends in one of `names`."""
    found = [path for path, _module in model.named_modules() if path.endswith(names)]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def _check_matching(model: nn.Module, targets: list[str], saved: list[str]) -> None:
    """Make sure that PEFT adapts the targets and nothing else.

    Raises:
        InputError: a target is part of a module that PEFT takes whole, or its path is the end of another's.
    """
    inside = [path for path in targets if any(f"{path}.".startswith(f"{module}.") for module in saved)]
    if inside:
        raise InputError(
            f"{argument('format', 'peft')}: PEFT keeps {', '.join(saved)} whole and adapts nothing inside, but the "
            f"basis adapts {', '.join(inside)}; make a basis without it ({argument('targets')} of factorize)"
        )
    ends = tuple(f".{path}" for path in targets)
    others = [path for path, _module in model.named_modules() if path not in targets and path.endswith(ends)]
    if others:
        raise InputError(
            f"{argument('format', 'peft')}: PEFT would adapt {', '.join(others)} too, whose path ends in a target's"
        )


def _saved_tensors(
    checkpoint: Checkpoint, model: nn.Module, customer: Coefficients, saved: list[str]
) -> dict[str, np.ndarray]:
    """The base's own tensors of the modules that PEFT demands, fp32, with the customer's in their place.

    Raises:
        InputError: the checkpoint lacks one.
    """
    tensors = {}
    for path in saved:
        for part in model.get_submodule(path).state_dict():
            name = f"{path}.{part}"
            if name not in customer.head and name not in checkpoint.tensor_files:
                raise InputError(f"{checkpoint.name} holds no tensor {name}, which PEFT demands for its head")
            own = customer.head.get(name)
            array = checkpoint.read(name).float().numpy() if own is None else own
            tensors[f"{PREFIX}.{name}"] = np.ascontiguousarray(array)
    return tensors


def _readme(checkpoint: Checkpoint, customer: Coefficients, outputs: int, output: Path) -> str:
    options = ""
    if outputs != len(checkpoint.labels):
        # Of another size than the base's, so the base must be opened with room for it.
        options = f", num_labels={outputs}, ignore_mismatched_sizes=True"
    # The paths of an encoder without a task head are those of its own class.
    headed = checkpoint.has_task_head or checkpoint.writes_text
    kind = task_named(checkpoint.task).model_class if headed else checkpoint.architecture
    names = json.dumps(list(customer.labels or checkpoint.labels), ensure_ascii=False)
    labels = "" if checkpoint.writes_text else f" Labels, in the order of the logits: {names}"
    return f"""---
base_model: {json.dumps(checkpoint.name, ensure_ascii=False)}
library_name: peft
---

# {output.name}

A QR-LoRA customer as a LoRA adapter: `A = R`, `B = Q diag(c)`, scaling 1.

```python
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained({json.dumps(checkpoint.name)}{options})
model = PeftModel.from_pretrained(base, {json.dumps(output.name)})
```

Load the base in fp32 for the logits that the customer was trained with.{labels}

base {checkpoint.digest[:12]}, basis {customer.basis_digest[:12]}, coefficients {customer.digest[:12]}
"""
