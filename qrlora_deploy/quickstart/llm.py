"""The whole way with a decoder: factorize, train three customers, export them switchable, ask them in one batch."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.sample import CUSTOMERS, as_prompts, held_out_examples, train_examples
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.exporting.options import make_options
from qrlora_deploy.exporting.registry import find_exporter
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis, read_basis, write_basis
from qrlora_deploy.formats.coefficients import write_coefficients
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.hub import SMALL_DECODER
from qrlora_deploy.models.locating import recorded_place
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.quickstart.journal import JOURNAL, MADE, Journal, resumable_folder
from qrlora_deploy.quickstart.llm_base import find_decoder
from qrlora_deploy.quickstart.llm_report import LlmReport, Matches, Written
from qrlora_deploy.quickstart.steps import Clock, Progress, renamed, size_of
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
MAX_ROWS = 24
"""Twice the rows of the batch that is shown: scoring is reading the weights, whatever the number of rows."""


def run(
    out: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    device: str = "cpu",
    base: str = SMALL_DECODER,
    train_rows: int = TRAIN_ROWS,
    held_out_rows: int = HELD_OUT_ROWS,
    resume: bool = False,
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
        resume: go on with what an interrupted run of `out` has made.

    Raises:
        ProviderError: CUDA was asked for and PyTorch cannot use it.
        InputError: there is no such base, `out` already holds something, or `resume` does not fit what was left.
        CheckFailed: the exported bundle does not agree with PyTorch.
        QrloraError: a step failed.
    """
    choose_device(device)
    marks: dict[str, str | int] = {"base": base, "seed": seed, "rows": train_rows, "held_out_rows": held_out_rows}
    with resumable_folder(out, resume) as work:
        journal = Journal(work / JOURNAL, marks)
        # Before anything is made: what goes on with it must know whose it is.
        journal.save()
        way = _Way(work / MADE, journal, Clock(journal.entries.seconds), seed, device, progress)
        checkpoint, basis = way.prepare(base)
        for name in CUSTOMERS:
            way.train(name, checkpoint, basis, train_rows)
        way.export(checkpoint, basis)
        with GenerationSession.open(way.folder / BUNDLE, way.folder / FILES, max_rows=MAX_ROWS) as session:
            with way.step("generate"):
                written = _write_in_one_batch(session)
            customers = tuple(way.score(session, name, train_rows, held_out_rows) for name in CUSTOMERS)
        return LlmReport(
            base=checkpoint.name if checkpoint.name != BASE else base,
            coefficients=basis.total_rank,
            layers=len(basis.targets),
            sizes=_sizes(checkpoint, way.folder),
            customers=customers,
            written=written,
            rows=len(written) * (len(CUSTOMERS) + 1),
            seconds=journal.entries.seconds,
            folder=out,
        )


@dataclass(frozen=True)
class _Way:
    """The steps; one whose product is there was done before, and is not done again.

    Attributes:
        folder: of the products, each of which appears there when it is whole.
        journal: what else is known of them.
        clock: the time of each step.
        seed: of every random choice.
        device: of factorizing and training.
        progress: called with (description, done, total).
    """

    folder: Path
    journal: Journal
    clock: Clock
    seed: int
    device: str
    progress: Progress | None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take the time of what is done within, and write it down."""
        with self.clock.step(name):
            yield
        self.journal.save()

    def prepare(self, base: str) -> tuple[Checkpoint, Basis]:
        """The base and its basis."""
        with self.step("base"):
            checkpoint = find_decoder(base, self.folder / BASE)
        file = self.folder / BASIS
        with self.step("factorize"):
            if not file.is_file():
                targets = choose_targets(checkpoint.skeleton())
                write_basis(factorize(checkpoint, targets, EnergyShare(0.5), self.device, self.progress), file)
            return checkpoint, read_basis(file)

    def train(self, name: str, checkpoint: Checkpoint, basis: Basis, count: int) -> None:
        """Train on the customer's own rows; the held-out rows choose nothing."""
        file, work = self.folder / FILES / f"{name}.safetensors", self.folder.parent / f"train-{name}"
        if file.is_file():
            return
        file.parent.mkdir(exist_ok=True)
        settings = TrainSettings(
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            packing=True,
            seed=self.seed,
            device=self.device,
        )
        rows, place = _spread(as_prompts(train_examples(name)), count), recorded_place(self.folder / BASIS, file)
        watch = renamed(f"train {name}", self.progress)
        with self.step("train"):
            write_coefficients(train(checkpoint, basis, rows, None, settings, work, True, place, watch), file)
        shutil.rmtree(work, ignore_errors=True)

    def export(self, checkpoint: Checkpoint, basis: Basis) -> None:
        """One bundle of all customers, held against PyTorch."""
        if (self.folder / BUNDLE).is_dir():
            return
        exporter = find_exporter("onnx")
        with self.step("export"):
            job = ExportJob(checkpoint, basis, self.folder / BUNDLE, None, self.progress)
            exporter.export(job, make_options(exporter, {}))

    def score(self, session: GenerationSession, name: str, train_rows: int, count: int) -> Matches:
        """How many held-out prompts the base and the customer answer as the data does."""
        known = self.journal.entries.scores
        if name not in known:
            with self.step("score"):
                prompts = _prompts(name, count)
                before, after = (_share_right(session, prompts, asker) for asker in (None, name))
                known[name] = {"before": before, "after": after, "held_out_rows": len(prompts)}
            if self.progress:
                self.progress("score", len(known), len(CUSTOMERS))
        return Matches(name, min(train_rows, len(train_examples(name))), **known[name])


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


def _share_right(session: GenerationSession, prompts: Sequence[tuple[str, str]], asker: str | None) -> float:
    answers = _ask(session, [(prompt, asker) for prompt, _ in prompts])
    return sum(answer == expected for answer, (_, expected) in zip(answers, prompts, strict=True)) / len(prompts)


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
