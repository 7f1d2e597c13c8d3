"""What each precision costs and gains on a CPU: parity, accuracy of customers, sizes, latency.

    python -m benchmarks.precision quickstart -o benchmarks/results/precision_cpu.json

The folder is one that `qrlora-deploy quickstart` left: a base, a basis and trained customers. The
customers' held-out rows come with the project, and so do the texts to calibrate on; options name
others. Each form is exported merged, for one customer, and switchable. Rows of a switchable batch are
different customers'. All bundles are timed in one process, in a random order each round, and a ratio
is the median of the ratios to fp32 in the same round, with its interval. Rows that are `lost` have the
right label in fp32 alone, rows that are `gained` in this form alone.

Exporting takes most of the time. With `--bundles FOLDER` the bundles stay there, and those that are there
already are measured as they are.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measuring import environment, summary
from exporters.onnx import export_merged, export_switchable
from exporters.onnx.calibrating import calibration_record
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.bench.environment import CPU_INFO, describe_environment
from qrlora_deploy.bench.labelled import labelled_files
from qrlora_deploy.bench.rounds import rest, seconds_of, warm_up
from qrlora_deploy.bench.statistics import ratio_in_rounds
from qrlora_deploy.bench.subjects import BundleSubject, Spec, folder_bytes
from qrlora_deploy.bench.workload import Workload
from qrlora_deploy.data.examples import Examples, TextRows, read_examples, read_texts
from qrlora_deploy.data.sample import CUSTOMERS, general_file, held_out_file
from qrlora_deploy.errors import CheckFailed, InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis, read_basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.formats.customer_files import customer_ids, read_customer
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.runtime.bundle.bundle import MODEL_FILE

KINDS = ("merged", "switchable")
REFERENCE = "fp32"
FORMS = {
    REFERENCE: ("fp32", False),
    "fp16": ("fp16", False),
    "int8": ("int8", False),
    "int8 calibrated": ("int8", True),
}
"""Precision, and whether it is calibrated, by the name in the record."""

SHAPES = ((1, 16), (8, 64))
"""Batch and length."""


@dataclass(frozen=True)
class Material:
    """What is exported, and asked.

    Attributes:
        folder: of the customers' files.
        customers: those that have labelled rows, by id.
        merged: the one of the merged bundles.
        labelled: rows of each customer.
        texts: to calibrate on.
    """

    checkpoint: Checkpoint
    basis: Basis
    folder: Path
    customers: Mapping[str, Coefficients]
    merged: str
    labelled: Mapping[str, Examples]
    texts: TextRows


def read_material(arguments: argparse.Namespace) -> Material:
    """Read what the options name.

    Raises:
        InputError: no customer has labelled rows, or the one to merge has none.
    """
    folder: Path = arguments.customers or arguments.folder
    files = labelled_files(arguments.data) if arguments.data else {name: held_out_file(name) for name in CUSTOMERS}
    names = sorted(set(customer_ids(folder)) & set(files))
    if not names:
        raise InputError(f"{folder} holds no customer with labelled rows; there are rows of {', '.join(sorted(files))}")
    merged = arguments.merged or names[0]
    if merged not in names:
        raise InputError(f"--merged {merged}: no customer with labelled rows; choose from {', '.join(names)}")
    return Material(
        checkpoint=open_checkpoint(str(arguments.base or arguments.folder / "base")),
        basis=read_basis(arguments.basis or arguments.folder / "basis.safetensors"),
        folder=folder,
        customers={name: read_customer(folder, name) for name in names},
        merged=merged,
        labelled={name: read_examples(files[name]) for name in names},
        texts=read_texts(arguments.calibration or general_file()),
    )


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export, ask, time; returns the record that is written."""
    material, before = read_material(arguments), describe_environment()
    names = [f"{kind} {form}" for kind in arguments.kinds for form in arguments.forms]
    refused = {name: reason for name in names if (reason := _export(material, name, folder / name))}
    subjects = {
        name: open_subject(material, name, folder / name, arguments.threads) for name in names if name not in refused
    }
    bundles = {name: _describe(subject) for name, subject in subjects.items()}
    for name, accuracy in measure_accuracy(subjects, material).items():
        bundles[name]["accuracy"] = accuracy
    return {
        "customers": list(material.customers),
        "merged_customer": material.merged,
        "total_rank": material.basis.total_rank,
        "labels": len(material.checkpoint.labels),
        "calibrated_on": Path(material.texts.name).name,
        "bundles": bundles | {name: {"refused": reason} for name, reason in refused.items()},
        "runs": arguments.runs,
        "threads": arguments.threads or "default",
        "clock": "CPU time" if arguments.threads == 1 else "wall",
        "latency": {
            f"{batch}x{length}": _time(subjects, batch, length, arguments.runs, arguments.threads)
            for batch, length in SHAPES
        },
        "environment": environment("cpu"),
        "host": {
            "cpu": before.host["cpu"],
            "vnni": _vnni(),
            "load_average": [before.load_average, describe_environment().load_average],
        },
    }


def _export(material: Material, name: str, output: Path) -> str:
    """Write a bundle where there is none; returns why its check of parity refused it, or nothing."""
    if output.exists():
        return ""
    print(f"export {name}", file=sys.stderr)
    merged, precision, texts = _form(material, name)
    job = ExportJob(
        material.checkpoint,
        material.basis,
        output,
        material.customers[material.merged] if merged else None,
    )
    options = OnnxOptions(0 if merged else _head_labels(material), precision, texts)
    try:
        export_merged(job, options) if merged else export_switchable(job, options)
    except CheckFailed as error:
        return str(error)
    return ""


def _form(material: Material, name: str) -> tuple[bool, str, TextRows | None]:
    """Of a bundle: whether it is a merged one, its precision, and the texts it is calibrated on."""
    kind, _, form = name.partition(" ")
    precision, calibrated = FORMS[form]
    return kind == "merged", precision, material.texts if calibrated else None


def _head_labels(material: Material) -> int:
    """Room for customers' own heads, where there are any."""
    own = [len(customer.labels) for customer in material.customers.values() if customer.head]
    return max(*own, len(material.checkpoint.labels)) if own else 0


def open_subject(material: Material, name: str, bundle: Path, threads: int | None = None) -> BundleSubject:
    """A bundle with all customers.

    Raises:
        InputError: it was exported from something else, or does not take a customer.
    """
    spec = Spec(
        name,
        "candidate",
        "bundle",
        bundle,
        folder=material.folder,
        customers=tuple(material.customers),
        threads=threads,
    )
    subject = BundleSubject(spec, [Workload(*shape) for shape in SHAPES])
    if subject.refused:
        raise InputError("; ".join(subject.refused.values()))
    merged, precision, texts = _form(material, name)
    expected = {
        "base_digest": material.checkpoint.digest,
        "basis_digest": material.basis.digest,
        "coefficients_digest": material.customers[material.merged].digest if merged else None,
        "precision": precision,
        "calibration": calibration_record(texts) if texts is not None else None,
    }
    wrong = [field for field, value in expected.items() if getattr(subject.bundle.manifest, field) != value]
    if wrong:
        raise InputError(f"--bundles {bundle}: another {', '.join(wrong)} than is asked for; name another folder")
    return subject


def _describe(subject: BundleSubject) -> dict[str, Any]:
    manifest = subject.bundle.manifest
    graph = subject.bundle.folder.glob(f"{MODEL_FILE}*")
    return {
        "graph_bytes": sum(path.stat().st_size for path in graph),
        "bundle_bytes": folder_bytes(subject.bundle.folder),
        "parity": manifest.parity.model_dump(mode="json", exclude_none=True),
        "calibration": manifest.calibration.model_dump(mode="json") if manifest.calibration else None,
    }


def measure_accuracy(subjects: Mapping[str, BundleSubject], material: Material) -> dict[str, dict[str, Any]]:
    """By subject and customer; a merged one has one customer."""
    found: dict[str, dict[str, Any]] = {name: {} for name in subjects}
    for customer, examples in material.labelled.items():
        asked = {
            name: np.array(subject.answer(examples.texts, examples.pairs, customer))
            for name, subject in subjects.items()
            if subject.switchable is not None or customer == material.merged
        }
        for name, answers in asked.items():
            reference = asked.get(reference_of(name))
            found[name][customer] = score(answers, np.array(examples.labels), reference)
            print(f"{name} {customer}: {found[name][customer]}", file=sys.stderr)
    return found


def reference_of(name: str) -> str:
    """The subject of the same kind in fp32."""
    return f"{name.partition(' ')[0]} {REFERENCE}"


def score(answers: np.ndarray, labels: np.ndarray, reference: np.ndarray | None) -> dict[str, Any]:
    """Share of right answers, and how the answers differ from those of the reference; `[rows]` labels each."""
    # A row's answer is a list of labels, of which a classifier gives one.
    answers = answers.reshape(labels.shape)
    reference = None if reference is None else reference.reshape(labels.shape)
    right = answers == labels
    found = {"rows": len(labels), "accuracy": float(right.mean())}
    if reference is None:
        return found
    before = reference == labels
    return found | {
        "same_label": float((answers == reference).mean()),
        "lost": int((before & ~right).sum()),
        "gained": int((right & ~before).sum()),
    }


def _time(
    subjects: Mapping[str, BundleSubject], batch: int, length: int, runs: int, threads: int | None
) -> dict[str, Any]:
    print(f"time {batch}x{length}", file=sys.stderr)
    calls = {name: subject.prepare(Workload(batch, length)) for name, subject in subjects.items()}
    for call in calls.values():
        warm_up(call)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    random = np.random.default_rng(2)
    for turn in range(runs):
        for name in random.permutation(list(calls)):
            # Threads of the one before have stopped spinning after the rest; its data fill the caches,
            # so that the second run counts.
            rest()
            calls[name](turn)
            samples[name].append((_cpu_seconds_of if threads == 1 else seconds_of)(calls[name], turn))
    # On a machine that does other work the fastest run is nearest to what a quiet one takes.
    return {
        name: summary(values) | {"min": 1e3 * min(values)} | _ratio(samples, name) for name, values in samples.items()
    }


def _cpu_seconds_of(call: Callable[[int], Any], turn: int) -> float:
    """How much of a processor one run takes, whatever else is done meanwhile."""
    start = time.process_time()
    call(turn)
    return time.process_time() - start


def _ratio(samples: Mapping[str, Sequence[float]], name: str) -> dict[str, Any]:
    """To fp32 of the same kind; nothing where it is missing or there are too few rounds."""
    reference = samples.get(reference_of(name))
    if reference is None or name == reference_of(name):
        return {}
    estimate = ratio_in_rounds(np.array(samples[name]), np.array(reference))
    return {} if estimate is None else {"ratio_to_fp32": asdict(estimate)}


def _vnni() -> list[str]:
    """What the processor has of instructions for sums of 8-bit products; empty where the system does not tell."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return sorted(flag for flag in flags if flag.endswith("vnni"))


def make_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds base, basis.safetensors and customers' files")
    parser.add_argument("--base", help="instead of the folder's: a folder or hub name")
    parser.add_argument("--basis", type=Path, help="instead of the folder's")
    parser.add_argument("--customers", type=Path, help="instead of the folder: that of the customers' files")
    parser.add_argument("--data", type=Path, help="folder with a labelled file for each customer, such as acme.tsv")
    parser.add_argument("--merged", help="customer of the merged bundles, by default the first by name")
    parser.add_argument("--calibration", type=Path, help="texts that int8 is calibrated on")
    parser.add_argument("--bundles", type=Path, help="folder to keep the bundles in, or that holds them already")
    parser.add_argument("--form", dest="forms", action="append", choices=list(FORMS), help="repeatable; all by default")
    parser.add_argument("--kind", dest="kinds", action="append", choices=KINDS, help="repeatable; both by default")
    parser.add_argument("--threads", type=int, help="with 1, CPU time is measured, for machines that do other work")
    parser.add_argument("--runs", type=int, default=60, help="rounds of each shape; 30 at least give a ratio")
    parser.add_argument("-o", "--output", type=Path)
    return parser


def main(given: Sequence[str] | None = None) -> None:
    """Parse, measure, print and write."""
    arguments = make_parser().parse_args(given)
    arguments.forms, arguments.kinds = arguments.forms or list(FORMS), arguments.kinds or list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, arguments.bundles or Path(folder))
    for name, bundle in record["bundles"].items():
        if "refused" in bundle:
            print(f"{name:26} refused: {bundle['refused']}")
            continue
        accuracy = ", ".join(f"{customer} {found['accuracy']:.3f}" for customer, found in bundle["accuracy"].items())
        print(f"{name:26} {bundle['graph_bytes'] / 1e6:6.1f} MB  {accuracy}")
    for shape, times in record["latency"].items():
        for name, found in times.items():
            ratio = found.get("ratio_to_fp32")
            shown = f"  x{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else ""
            print(f"{shape:5} {name:26} p50 {found['p50']:8.2f} ms  min {found['min']:8.2f} ms{shown}")
    if arguments.output:
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
