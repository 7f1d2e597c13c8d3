"""The whole way with a decoder: factorize, train three customers, export them switchable, ask them in one batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.sample import CUSTOMERS, as_prompts, held_out_examples, train_examples
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.exporting.options import make_options
from qrlora_deploy.exporting.registry import find_exporter
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.io.temporary import scratch_folder
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.hub import SMALL_DECODER
from qrlora_deploy.models.locating import recorded_place
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.quickstart.llm_base import find_decoder
from qrlora_deploy.quickstart.llm_report import LlmReport, Matches, Written
from qrlora_deploy.quickstart.steps import Clock, Progress, kept_folder, renamed, size_of
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.training.settings import TrainSettings, choose_device
from qrlora_deploy.training.trainer import train

BASE, BASIS, BUNDLE, FILES = "base", "basis.safetensors", "bundle", "customers"
ALONE = "base"
"""What the base without a customer is called in a report."""

TRAIN_ROWS, HELD_OUT_ROWS = 600, 60
EPOCHS, BATCH_SIZE, MAX_LENGTH = 2, 16, 64
"""Few: the whole way should take less than 15 minutes on two cores."""
ANSWER_TOKENS = 12
"""More than any label has; a base that does not know when to end is stopped here."""
MAX_ROWS = 12


def run(
    out: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    device: str = "cpu",
    base: str = SMALL_DECODER,
    train_rows: int = TRAIN_ROWS,
    held_out_rows: int = HELD_OUT_ROWS,
) -> LlmReport:
    """Go the whole way with a decoder and the data that comes with the project.

    Args:
        out: new folder for the basis, customers and bundle, and the base where it was converted, which appears when
            everything is done; without it a temporary folder is used and removed.
        progress: called with (description, done, total).
        seed: of every random choice.
        device: "cpu" or "cuda", of factorizing and training; the bundle is for the CPU.
        base: folder or hub name of a decoder; without a network the default one comes from an installed package.
        train_rows: rows that each customer trains on.
        held_out_rows: prompts that each customer is scored on.

    Raises:
        ProviderError: CUDA was asked for and PyTorch cannot use it.
        InputError: there is no such base, or `out` already holds something.
        CheckFailed: the exported bundle does not agree with PyTorch.
        QrloraError: a step failed.
    """
    if out is not None:
        check_free_folder(out)
    choose_device(device)
    clock = Clock()
    with kept_folder(out) as folder:
        with clock.step("base"):
            checkpoint = find_decoder(base, folder / BASE)
        with clock.step("factorize"):
            basis = _factorize(checkpoint, folder, device, progress)
        (folder / FILES).mkdir()
        settings = TrainSettings(epochs=EPOCHS, batch_size=BATCH_SIZE, max_length=MAX_LENGTH, seed=seed, device=device)
        with clock.step("train"):
            for name in CUSTOMERS:
                _train(name, checkpoint, basis, folder, settings, train_rows, progress)
        with clock.step("export"):
            exporter = find_exporter("onnx")
            exporter.export(ExportJob(checkpoint, basis, folder / BUNDLE, None, progress), make_options(exporter, {}))
        with GenerationSession.open(folder / BUNDLE, folder / FILES, max_rows=MAX_ROWS) as session:
            with clock.step("generate"):
                written = _write_in_one_batch(session)
            with clock.step("score"):
                customers = _score(session, train_rows, held_out_rows, progress)
        return LlmReport(
            base=checkpoint.name if checkpoint.name != BASE else base,
            coefficients=basis.total_rank,
            layers=len(basis.targets),
            sizes=_sizes(checkpoint, folder),
            customers=customers,
            written=written,
            rows=len(written) * (len(CUSTOMERS) + 1),
            seconds=clock.seconds,
            folder=out,
        )


def _factorize(checkpoint: Checkpoint, folder: Path, device: str, progress: Progress | None) -> Basis:
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5), device, progress)
    write_basis(basis, folder / BASIS)
    return basis


def _train(
    name: str,
    checkpoint: Checkpoint,
    basis: Basis,
    folder: Path,
    settings: TrainSettings,
    count: int,
    progress: Progress | None,
) -> Coefficients:
    """Train on the customer's own rows; the held-out rows choose nothing."""
    file = folder / FILES / f"{name}.safetensors"
    rows = _spread(as_prompts(train_examples(name)), count)
    place = recorded_place(folder / BASIS, file)
    with scratch_folder() as work:
        watch = renamed(f"train {name}", progress)
        customer = train(checkpoint, basis, rows, None, settings, work, False, place, watch)
    write_coefficients(customer, file)
    return customer


def _spread(examples: Examples, count: int) -> Examples:
    """So many rows, evenly over the file, where rows of one label stand together."""
    count = min(count, len(examples))
    return examples.take([number * len(examples) // count for number in range(count)])


def _write_in_one_batch(session: GenerationSession) -> tuple[Written, ...]:
    """A held-out prompt of each customer, asked of the base and of every customer: all of them rows of one batch."""
    rows = [(name, *_prompts(name, 5)[2]) for name in CUSTOMERS]
    askers = (None, *CUSTOMERS)
    asked = [(prompt, asker) for _, prompt, _ in rows for asker in askers]
    answers = iter(_ask(session, asked))
    return tuple(
        Written(prompt.splitlines()[0], name, expected, {asker or ALONE: next(answers) for asker in askers})
        for name, prompt, expected in rows
    )


def _score(session: GenerationSession, train_rows: int, count: int, progress: Progress | None) -> tuple[Matches, ...]:
    found = []
    for done, name in enumerate(CUSTOMERS, start=1):
        prompts = _prompts(name, count)
        shares = []
        for asker in (None, name):
            answers = _ask(session, [(prompt, asker) for prompt, _ in prompts])
            right = [answer == expected for answer, (_, expected) in zip(answers, prompts, strict=True)]
            shares.append(sum(right) / len(right))
        found.append(Matches(name, min(train_rows, len(train_examples(name))), len(prompts), *shares))
        if progress:
            progress("score", done, len(CUSTOMERS))
    return tuple(found)


def _prompts(name: str, count: int) -> list[tuple[str, str]]:
    """Held-out prompts of a customer with the answers that the data has."""
    turns = _spread(as_prompts(held_out_examples(name)), count).turns or ()
    return [(prompt.content, answer.content.strip()) for prompt, answer in turns]


def _ask(session: GenerationSession, asked: Sequence[tuple[str, str | None]]) -> list[str]:
    requests = [GenerationRequest(prompt, asker, max_tokens=ANSWER_TOKENS) for prompt, asker in asked]
    return [_told(answer) for answer in session.answers(requests)]


def _told(answer: Any) -> str:
    if answer.error is not None:
        raise answer.error
    return str(answer.text).strip()


def _sizes(checkpoint: Checkpoint, folder: Path) -> dict[str, int]:
    kept = {
        "the base": checkpoint.folder,
        "the basis": folder / BASIS,
        "one customer": folder / FILES / f"{CUSTOMERS[0]}.safetensors",
        "the bundle of all customers": folder / BUNDLE,
    }
    return {what: size_of(place) for what, place in kept.items()}
