"""What a merged checkpoint says about itself: `qrlora.json`, its model card, and its labels."""

import json
import platform
import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.formats.config_file import THRESHOLDS_KEY
from qrlora_deploy.io.files import write_json
from qrlora_deploy.io.reading import is_file, parse_json, read_text
from qrlora_deploy.io.strict import from_json
from qrlora_deploy.io.versions import Versions
from qrlora_deploy.tasks.base import TASK_FIELD
from qrlora_deploy.tasks.registry import task_named
from qrlora_deploy.version import __version__

FILE_NAME = "qrlora.json"
FORMAT = "qrlora-merge"
VERSIONS = Versions(1)

MAX_BYTES = 16 * 2**20
"""A provenance file is a few kB; a larger one is refused before it is read."""

LABEL_KEYS = ("id2label", "label2id", "problem_type", "num_labels", TASK_FIELD, THRESHOLDS_KEY)
"""Entries of config.json that a customer's labels change."""


@dataclass(frozen=True)
class MergedTarget:
    """One weight that carries an update.

    Attributes:
        name: module path, as in the basis.
        tensor: name in the checkpoint's files.
        rank: coefficients spent on it.
        merged_digest: SHA-256 of the stored bytes after merging.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    tensor: str
    rank: int
    merged_digest: str


@dataclass(frozen=True)
class Provenance:
    """Everything needed to check, and to take back, a merge.

    Attributes:
        base_name: the base as it was named.
        base_digest: of all its tensors.
        basis_digest: the basis.
        coefficients_digest: the customer's values and head.
        task: name of the task.
        labels: in the order of the logits.
        head: tensors that the customer's own head replaced.
        base_labels: what config.json held under `LABEL_KEYS` before the merge.
        targets: the weights that were changed.
        rounding: the figures of the merge report.
        training: the customer's training record.
        versions: of the tools that merged.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    base_name: str
    base_digest: str
    basis_digest: str
    coefficients_digest: str
    task: str
    labels: tuple[str, ...]
    head: tuple[str, ...]
    base_labels: dict[str, Any]
    targets: tuple[MergedTarget, ...]
    rounding: dict[str, float]
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def write_provenance(provenance: Provenance, folder: Path) -> None:
    """Write `qrlora.json` into `folder`, replacing an older one atomically."""
    write_json(folder / FILE_NAME, {"format": FORMAT, "format_version": VERSIONS.current} | asdict(provenance))


def read_provenance(folder: Path) -> Provenance:
    """Read `qrlora.json` of a merged checkpoint.

    Raises:
        InputError: there is none.
        FileFormatError: it is damaged or of another version.
    """
    path = folder / FILE_NAME
    if not is_file(path):
        raise InputError(f"{folder} holds no {FILE_NAME}: it was not written by `qrlora-deploy merge`")
    record = _read_object(path)
    if record.pop("format", None) != FORMAT:
        raise FileFormatError(f"{path} is not a {FORMAT} file")
    record = VERSIONS.upgraded(path, record, f"{path} is damaged")
    del record["format_version"]
    provenance = from_json(Provenance, json.dumps(record), f"{path} is damaged")
    unknown = sorted(provenance.base_labels.keys() - set(LABEL_KEYS))
    if unknown:
        raise FileFormatError(f"{path} is damaged: base_labels has {', '.join(unknown)}, which no merge changes")
    return provenance


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint as it is stored.

    Raises:
        InputError: it is missing.
        FileFormatError: it is not a JSON object.
    """
    path = folder / "config.json"
    if not is_file(path):
        raise InputError(f"{folder} holds no config.json: give a Hugging Face checkpoint")
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    value = parse_json(read_text(path, MAX_BYTES), f"{path} is not valid JSON")
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} must hold a JSON object")
    return value


def with_labels(
    config: dict[str, Any], task: str, labels: tuple[str, ...], outputs: int, thresholds: tuple[float, ...] = ()
) -> dict[str, Any]:
    """A copy of `config` for `outputs` logits named `labels`; without labels only the count changes."""
    names = labels or tuple(f"LABEL_{index}" for index in range(outputs))
    changed = dict(config)
    if names:
        changed["id2label"] = {str(index): name for index, name in enumerate(names)}
        changed["label2id"] = {name: index for index, name in enumerate(names)}
    fields = task_named(task).config_fields
    changed = {key: value for key, value in changed.items() if key not in ("problem_type", TASK_FIELD, THRESHOLDS_KEY)}
    changed |= {key: value for key, value in fields.items() if value is not None}
    if thresholds:
        changed[THRESHOLDS_KEY] = list(thresholds)
    if names and "num_labels" in config:
        changed["num_labels"] = outputs
    return changed


def labels_of(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of `config` that `with_labels` may change, for `with_base_labels`."""
    return {key: config[key] for key in LABEL_KEYS if key in config}


def with_base_labels(config: dict[str, Any], provenance: Provenance) -> dict[str, Any]:
    """A copy of a merged `config` with the labels that the base had."""
    kept = {key: value for key, value in config.items() if key not in LABEL_KEYS}
    return kept | provenance.base_labels


def tool_versions() -> dict[str, str]:
    """Versions of this tool and of the libraries that do the arithmetic and the files."""
    found = {"qrlora-deploy": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def model_card(provenance: Provenance) -> str:
    """The README.md of a merged checkpoint, with the metadata block that the Hub reads."""
    task = task_named(provenance.task)
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task.pipeline}"]
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", provenance.base_name) and not Path(provenance.base_name).exists():
        lines.append(f"base_model: {provenance.base_name}")
    lines += ["tags:", "- qr-lora", "- qrlora-deploy", "---", ""]
    # Only the last part of a folder's path: a card is published, the layout of a disk is not.
    base = _inline(Path(provenance.base_name).name)
    total = sum(target.rank for target in provenance.targets)
    lines += [
        f"# {base}, merged with a QR-LoRA customer",
        "",
        f"The weights of `{base}` plus {total} QR-LoRA coefficients on {len(provenance.targets)} weights "
        "(`W + Q diag(c) R`, Liang and Bharadwaj, arXiv 2508.21810), folded into plain weights. "
        f"Task: {provenance.task}. The licence is that of the base model.",
        "",
        "```python",
        f"from transformers import {task.model_class}",
        "",
        f'model = {task.model_class}.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    rows = [
        ("Base digest", provenance.base_digest),
        ("Basis digest", provenance.basis_digest),
        ("Coefficients digest", provenance.coefficients_digest),
        ("Labels", ", ".join(provenance.labels) or "none"),
        ("Own head", ", ".join(provenance.head) or "no, the base's"),
        ("Largest update of a weight", f"{provenance.rounding.get('max_update', 0.0):.3e}"),
        ("Largest rounding error", f"{provenance.rounding.get('max_rounding_error', 0.0):.3e}"),
        ("Weights that rounding left unchanged", f"{provenance.rounding.get('unchanged_share', 0.0):.2%}"),
        *((f"Training: {key}", _short(value)) for key, value in sorted(provenance.training.items())),
    ]
    lines += ["| | |", "| --- | --- |", *(f"| {_inline(name)} | {_inline(value)} |" for name, value in rows), ""]
    lines += [f"`{FILE_NAME}` holds the same in full; `qrlora-deploy merge --unmerge` takes the update out.", ""]
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else text[:197] + "..."


def _inline(text: str) -> str:
    """`text` on one line of a Markdown table: labels come from customers' data."""
    flat = re.sub(r"\s+", " ", text)
    return re.sub(r"([|`<>\[\]\\])", r"\\\1", flat)
