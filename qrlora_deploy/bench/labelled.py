"""Accuracy on customers' own labelled files, beside that of the base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qrlora_deploy.bench.report_parts import Accuracy
from qrlora_deploy.bench.subjects import BundleSubject
from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.formats.coefficients import CUSTOMER_ID
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.names import label_index
from qrlora_deploy.tasks.registry import task_named

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples

Names = tuple[str, ...]

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")


def labelled_files(folder: Path) -> dict[str, Path]:
    """Files `<customer>.tsv`, `.csv`, `.jsonl` or `.parquet` of a folder, by customer.

    Raises:
        InputError: there is none, or a customer has two.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder with a labelled file for each customer")
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and CUSTOMER_ID.fullmatch(file.stem))
    if not files:
        raise InputError(f"{folder} holds no labelled files, such as acme.tsv")
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise InputError(f"{folder} holds two files for {file.stem}: {found[file.stem].name} and {file.name}")
        found[file.stem] = file
    return found


def measure_accuracy(subject: BundleSubject, files: Mapping[str, Path]) -> list[Accuracy]:
    """Accuracy of a subject for every customer it serves; what cannot be measured says why.

    A merged bundle holds one customer: the one whose name its folder has, or else the only one.
    """
    return [_measure(subject, customer, files[customer]) for customer in _served(subject, files)]


def with_reference(found: Sequence[Accuracy], reference: Sequence[Accuracy]) -> list[Accuracy]:
    """`found`, each with the accuracy of the reference for the same customer and as many rows."""
    known = {(item.customer, item.rows): item for item in reference if not item.error}
    return [_beside(item, known.get((item.customer, item.rows))) for item in found]


def _beside(item: Accuracy, reference: Accuracy | None) -> Accuracy:
    if item.error or reference is None:
        return item
    return item.model_copy(update={"reference_accuracy": reference.accuracy, "reference_nll": reference.nll})


def _served(subject: BundleSubject, files: Mapping[str, Path]) -> list[str]:
    if subject.switchable is not None:
        return sorted(files)
    name = subject.bundle.folder.name
    return [name] if name in files else sorted(files) if len(files) == 1 else []


def _measure(subject: BundleSubject, customer: str, file: Path) -> Accuracy:
    nothing = Accuracy(subject=subject.record.name, customer=customer, data=str(file))
    try:
        task = task_named(subject.bundle.manifest.task)
        if not task.has_accuracy:
            raise InputError(f"a {task.name} has no accuracy")
        if subject.switchable is not None and customer not in subject.customers:
            raise InputError(subject.refused.get(customer, f"no file of {customer} is among the customers"))
        # Imported here: it takes a quarter of a second; no PyTorch in it.
        from qrlora_deploy.data.examples import read_examples

        examples = read_examples(file)
        task.check_rows(examples)
        labels = subject.bundle.manifest.labels
        answers = subject.answer(examples.texts, examples.pairs, customer, examples.words)
        # A customer with labels of its own answers with those.
        names = {name for answer in answers for name in answer}
        own = _share(task, answers, examples, labels if names <= label_index(labels).keys() else sorted(names))
        base = None
        if subject.switchable is not None and not task.unknown(examples, labels):
            found = subject.answer(examples.texts, examples.pairs, None, examples.words)
            base = _share(task, found, examples, labels)
        return nothing.model_copy(update={"rows": len(examples), "accuracy": own, "base_accuracy": base})
    except QrloraError as error:
        return nothing.model_copy(update={"error": str(error)})


def _share(task: Task, found: Sequence[Names], examples: "Examples", names: Sequence[str]) -> float:
    """Of answers that mean the same outputs as the labels of `examples`; `names` are those of all answers."""
    expected = [task.names_in(label) for label in examples.labels]
    return sum(task.matches(one, other, names) for one, other in zip(found, expected, strict=True)) / len(expected)
