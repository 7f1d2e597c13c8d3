"""One family from `factorize` to the last bundle, each answer held against a merge of this module's own."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from benchmarks.models.families import Family
from exporters.onnx import export_merged, export_switchable
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.sample import sample_texts
from qrlora_deploy.errors import QrloraError, first_line
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.merging.checkpoints import merge
from qrlora_deploy.models.capacity import padding_reach
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets, left_out
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime import SwitchableSession, open_bundle, open_session
from qrlora_deploy.runtime.verification.parity import without_padding
from qrlora_deploy.tokenization.words import words_of
from qrlora_deploy.training.fleet.customers import FleetSource
from qrlora_deploy.training.fleet.options import FleetOptions
from qrlora_deploy.training.fleet.run import train_fleet
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trainer import train

ROWS = 24
LENGTHS = (24, 20, 15, 21)
"""Tokens of the rows of the batch that is compared: more than any window or block of the families."""

OWNERS = ("one", "two", None, "two")
SETTINGS = TrainSettings(epochs=2, batch_size=8, max_length=32, learning_rate=0.1, device="cpu")
MOST = {"merge": 1e-3, "merged": 1e-3, "switchable": 1e-3, "padding-free": 1e-3, "fp16": 1e-1}
"""Largest errors by the effect of a customer: from there on an answer may be that of another one."""

STEPS = ("train", "trunk cache", "fleet", "merge", "merged", "switchable", "fp16", "int8", "padding-free")


@dataclass
class Tried:
    """What was found of a family.

    Attributes:
        facts: by step: the largest error, or words.
        refused: step and message of the first refusal.
        fault: by step: an error that is no refusal.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    fault: dict[str, str] = field(default_factory=dict)

    def run(self, step: str, action: Callable[[], Any], folder: Path) -> Any:
        """The result of `action`, or None where it failed; the failure is noted."""
        try:
            result = action()
        except QrloraError as error:
            self.refused[step] = str(error).replace(f"{folder}/base", "BASE").replace(str(folder), "FOLDER")
        except Exception as error:  # what the page calls a fault
            self.fault[step] = f"{type(error).__name__}: {first_line(error)}"[:300]
        else:
            return result
        return None


def try_family(family: Family, folder: Path) -> dict[str, Any]:
    """Run every step of a family in an empty folder.

    Returns:
        The facts, refusals and faults by step, as JSON.
    """
    tried = Tried()
    try:
        family.save(folder / "base")
    except AttributeError as error:
        return {"absent": first_line(error)}
    checkpoint = open_checkpoint(str(folder / "base"))
    basis = tried.run("factorize", lambda: _factorize(checkpoint, tried), folder)
    if basis is not None:
        _Whole(family, folder, checkpoint, basis, tried).run()
    return {"facts": tried.facts, "refused": tried.refused, "fault": tried.fault}


def _factorize(checkpoint: Checkpoint, tried: Tried) -> Basis:
    checkpoint.check_base()
    names = choose_targets(checkpoint.skeleton())
    tried.facts["targets"] = len(names)
    tried.facts["left out"] = [str(part) for part in left_out(checkpoint.skeleton())]
    return factorize(checkpoint, names, EnergyShare(0.5))


class _Whole:
    """The steps after `factorize`."""

    def __init__(self, family: Family, folder: Path, checkpoint: Checkpoint, basis: Basis, tried: Tried) -> None:
        self.family, self.folder, self.checkpoint, self.basis, self.tried = family, folder, checkpoint, basis, tried
        self.customers: dict[str, Coefficients] = {}
        self.inputs: dict[str, np.ndarray] = {}
        self.expected: dict[str | None, np.ndarray] = {}

    def run(self) -> None:
        """Go on as far as there is something to go on with."""
        if self._step("train", self._train) is None:
            return
        self._step("trunk cache", self._trunk_cache)
        self._step("fleet", self._fleet)
        self.inputs = self._batch()
        models = {owner: self._own_model(owner) for owner in ("one", "two", None)}
        self.expected = {owner: _logits(model, self.inputs) for owner, model in models.items()}
        self.tried.facts["effect"] = _error(self.expected["one"], self.expected[None])
        self._step("merge", self._merge)
        self._step("merged", self._merged)
        for name, options in {
            "switchable": {},
            "fp16": {"precision": "fp16"},
            "int8": {"precision": "int8"},
            "padding-free": {"padding_free": True},
        }.items():
            self._step(name, lambda name=name, options=options: self._switchable(name, **options))  # type: ignore[misc]

    def _step(self, name: str, action: Callable[[], Any]) -> Any:
        found = self.tried.run(name, action, self.folder)
        if found is not None:
            self.tried.facts[name] = found
        most = MOST.get(name, float("inf")) * self.tried.facts.get("effect", float("inf"))
        if isinstance(found, float) and found > most:
            self.tried.fault[name] = f"its answers differ by {found:.1e}, more than {most:.1e}"
        return found

    def _examples(self, name: str) -> Examples:
        shift = 1 if name == "one" else 2
        labels = [
            str(len(text) % 7 / 7 * shift) if self.family.numbers else f"LABEL_{(index * shift + len(text)) % 3}"
            for index, text in enumerate(sample_texts()[:ROWS])
        ]
        if self.family.tags:
            words = [words_of(text) for text in sample_texts()[:ROWS]]
            tags = [tuple(f"LABEL_{(index * shift + at) % 3}" for at, _ in row) for index, row in enumerate(words)]
            return Examples(sample_texts()[:ROWS], None, tags, f"{name}.jsonl", words)
        # Pairs of texts that follow each other, where the task is about pairs; nothing is known of them but that.
        pairs = None if self.family.task == "auto" else sample_texts()[shift : ROWS + shift]
        if self.family.task == "embedding":
            labels = [""] * ROWS
        if self.family.task == "reranker":
            labels = [str(abs(shift - 1 - len(text) % 7 / 7)) for text in sample_texts()[:ROWS]]
        return Examples(sample_texts()[:ROWS], pairs, labels, f"{name}.tsv")

    def _train(self) -> float:
        for name in ("one", "two"):
            self.customers[name] = self._coefficients(name, "auto")
            write_coefficients(self.customers[name], self.folder / f"{name}.safetensors")
        return float(np.abs(self.customers["one"].values).max())

    def _coefficients(self, name: str, cache: str) -> Coefficients:
        settings = replace(SETTINGS, trunk_cache=cache, task=self.family.task)
        work = self.folder / f"work-{name}-{cache}"
        return train(self.checkpoint, self.basis, self._examples(name), None, settings, work)

    def _trunk_cache(self) -> Any:
        place = str(self.customers["one"].training["trunk_cache"])
        if place.startswith("off"):
            return place
        return self._distance(self._coefficients("one", "off"))

    def _distance(self, other: Coefficients) -> float:
        """Largest difference to customer "one", as a share of the largest coefficient."""
        values = self.customers["one"].values
        return float(np.abs(other.values - values).max() / np.abs(values).max())

    def _fleet(self) -> float:
        data, output = self.folder / "fleet", self.folder / "customers"
        data.mkdir()
        for name in ("one", "two"):
            part = self._examples(name)
            _write(part, data / part.name)
        settings = replace(SETTINGS, task=self.family.task)
        report = train_fleet(self.checkpoint, self.basis, FleetSource(data), settings, FleetOptions(output))
        failed = [line.reason for line in report.lines if line.reason]
        if failed:
            raise QrloraError(failed[0])
        return self._distance(read_coefficients(output / "one.safetensors"))

    def _batch(self) -> dict[str, np.ndarray]:
        """Four texts with their padding on the left, where positions, windows and the place of the answer matter.

        On the right where the first token, at which the model answers, would see nothing but padding.
        """
        tokenizer = self.checkpoint.tokenizer()
        texts = [" ".join(sample_texts()[index : index + 4]) for index in range(4)]
        encoded = [tokenizer(text, truncation=True, max_length=most) for text, most in zip(texts, LENGTHS, strict=True)]
        width = max(LENGTHS)
        left = padding_reach(self.checkpoint.skeleton()) is None
        made = {}
        for name, fill in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0)):
            gaps = [width - len(row[name]) for row in encoded]
            sides = [(gap, 0) if left else (0, gap) for gap in gaps]
            rows = [np.pad(row[name], side, constant_values=fill) for row, side in zip(encoded, sides, strict=True)]
            made[name] = np.stack(rows).astype(np.int64)
        return made

    def _load(self, folder: Path) -> Any:
        options = {"attn_implementation": "eager", "dtype": torch.float32}
        return self.checkpoint.model_class.from_pretrained(folder, trust_remote_code=False, **options).eval()

    def _own_model(self, owner: str | None) -> Any:
        """`W + (Q * c) @ R` in fp64, without the project's own merge."""
        model = self._load(self.checkpoint.folder)
        if owner is None:
            return model
        parts = self.basis.split(self.customers[owner].values)
        for target in self.basis.targets:
            update = (target.q.astype(np.float64) * parts[target.name]) @ target.r.astype(np.float64)
            layer = model.get_submodule(target.name)
            update = update.T if isinstance(layer, Conv1D) else update
            layer.weight.data = (layer.weight.data.double() + torch.from_numpy(update)).float()
        return model

    def _merge(self) -> float:
        merge(self.checkpoint, self.basis, self.customers["one"], self.folder / "merged")
        return _error(_logits(self._load(self.folder / "merged"), self.inputs), self.expected["one"])

    def _merged(self) -> float:
        output = self.folder / "merged-bundle"
        export_merged(ExportJob(self.checkpoint, self.basis, output, self.customers["one"]))
        session = open_session(open_bundle(output).model, threads=1)
        names = {value.name for value in session.get_inputs()}
        found = session.run(None, {name: array for name, array in self.inputs.items() if name in names})[0]
        return _error(without_padding(found, self.inputs), self.expected["one"])

    def _switchable(self, name: str, **options: Any) -> float:
        output = self.folder / name
        task = None if self.family.task == "auto" else self.family.task
        export_switchable(ExportJob(self.checkpoint, self.basis, output), OnnxOptions(task=task, **options))
        session = SwitchableSession(open_bundle(output), threads=1)
        for customer in ("one", "two"):
            session.load(customer, self.folder / f"{customer}.safetensors")
        found, _labels = session.predict(self.inputs, list(OWNERS))
        expected = np.stack([self.expected[owner][row] for row, owner in enumerate(OWNERS)])
        # Of tokens that are padding nobody reads an answer.
        return _error(without_padding(found, self.inputs), expected)


def _write(part: Examples, file: Path) -> None:
    """The rows as a file for a fleet."""
    if part.words is None:
        columns = [part.texts, *([part.pairs] if part.pairs is not None else []), map(str, part.labels)]
        names = ["text", *(["text_pair"] if part.pairs is not None else []), "label"]
        rows = ["\t".join(row) for row in (names, *zip(*columns, strict=True))]
    else:
        rows = [
            json.dumps({"tokens": [text[start:end] for start, end in places], "tags": tags})
            for text, places, tags in zip(part.texts, part.words, part.labels, strict=True)
        ]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _logits(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Logits, or of a model without a head the mean of its states over the attention mask."""
    with torch.no_grad():
        answer = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    if "logits" in answer:
        return without_padding(answer.logits.numpy(), inputs)
    states, mask = answer.last_hidden_state.double().numpy(), inputs["attention_mask"][:, :, None]
    means: np.ndarray = (states * mask).sum(1) / mask.sum(1)
    return means


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    present = np.isfinite(expected)
    return float(np.abs(found[present].astype(np.float64) - expected[present]).max())
