"""A manifest, which nothing seals, held against the files that it seals."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qrlora_deploy.runtime.bundle.manifest import Manifest
from qrlora_deploy.runtime.bundle.row_layout import BASE_HEAD_FILE, HeadLayout, TableLayout
from qrlora_deploy.runtime.bundle.sealed_facts import (
    CONFIG_FILE,
    REFERENCE_FILE,
    TOKENIZER_CONFIG_FILE,
    ConfigFacts,
    read_config_facts,
    read_head_row,
    read_padding_side,
    read_reference_facts,
)
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.regression import Regression


def manifest_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What the manifest says otherwise than `config.json` and the reference."""
    yield from _config_problems(folder, manifest)
    yield from _reference_problems(folder, manifest)


def _config_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    facts = read_config_facts(folder / CONFIG_FILE)
    if manifest.labels != facts.labels:
        yield f"its labels are not those of {CONFIG_FILE}"
    if (manifest.thresholds or ()) != facts.thresholds:
        yield f"its thresholds are not those of {CONFIG_FILE}"
    if manifest.task != facts.task.name and not _left_by_an_earlier_version(manifest, facts):
        yield f"its task is not that of {CONFIG_FILE}"


def _left_by_an_earlier_version(manifest: Manifest, facts: ConfigFacts) -> bool:
    """Whether a merged customer of classes has the config of a base that gave a number."""
    found = (manifest.kind, manifest.task, facts.task.name)
    return found == ("merged", Classification.name, Regression.name)


def _reference_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    facts = read_reference_facts(folder / REFERENCE_FILE)
    if facts.sealed:
        changed = manifest.changed_fields(facts.sealed)
        if changed:
            yield f"its {', '.join(changed)} {'is' if len(changed) == 1 else 'are'} not as in {REFERENCE_FILE}"
    else:
        yield from _older_problems(folder, manifest, facts.max_length)
    padding = {"input_ids": manifest.pad_token_id, "token_type_ids": manifest.pad_token_type_id}
    if any(facts.padding.get(name, frozenset()) - {value} for name, value in padding.items()):
        yield f"its padding is not that of {REFERENCE_FILE}"
    if manifest.kind == "merged":
        return
    # A wrong rank would give a customer's numbers to other directions, in a row of the same width.
    # The sizes come first: they keep hostile numbers from taking memory.
    layout = TableLayout([target.rank for target in manifest.targets])
    if layout.total_rank != len(facts.columns) or not np.array_equal(layout.columns, facts.columns):
        yield f"its ranks are not those of {REFERENCE_FILE}"
    head = HeadLayout(manifest.head_labels, manifest.head_features)
    if head.width != len(facts.base_head):
        yield f"its head is not that of {REFERENCE_FILE}"
    elif manifest.head_labels and not np.array_equal(read_head_row(folder / BASE_HEAD_FILE, head), facts.base_head):
        yield f"{BASE_HEAD_FILE} is not the head of {REFERENCE_FILE}"


def _older_problems(folder: Path, manifest: Manifest, longest: int) -> Iterator[str]:
    """Of a bundle of an earlier version, whose reference repeats no manifest but holds the longest text there is."""
    if manifest.max_length != longest:
        yield f"its max_length is not {longest}, the longest text of {REFERENCE_FILE}"
    if read_padding_side(folder) not in (None, manifest.padding_side):
        yield f"its padding_side is not that of {TOKENIZER_CONFIG_FILE}"
    if manifest.truncation_side != "right":
        yield "its truncation_side is not the right one, the only one that its version knew"
