"""What a base does with text, against transformers' own loss and hidden states, and bases that are chosen by it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

import qrlora_deploy as qr
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.factorization.from_checkpoint import factorize, read_weight
from qrlora_deploy.factorization.weighting import weighted
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.adapter import attach
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.sensitivity_budget import SensitivityBudget
from qrlora_deploy.training.observing import Observation, second_moments, sensitivities
from tests.cli.running import succeed_here
from tests.tiny import LABELS, SENTENCES
from tests.tolerances import BASIS_FP32

CLOSE: dict[str, float] = {"rtol": 2e-4, "atol": 1e-9}
"""Two ways to the same gradient in fp32, squared."""

TARGETS = ("query", "value", "intermediate.dense", "output.dense")

LOOK = Observation(batches=2, batch_size=8, max_length=32)


@pytest.fixture(scope="module")
def bert(tiny_base: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_base))


@pytest.fixture(scope="module")
def full(bert: Checkpoint) -> Basis:
    return factorize(bert, choose_targets(bert.skeleton(), TARGETS), EnergyShare(1.0))


def customer(name: str, sentences: tuple[str, ...]) -> Examples:
    return Examples(list(sentences), None, [LABELS[len(text) % 4] for text in sentences], name)


@pytest.fixture(scope="module")
def customers() -> list[Examples]:
    return [customer("acme", SENTENCES[:4]), customer("umbrella", SENTENCES[2:])]


def encoded(checkpoint: Checkpoint, part: Examples) -> dict[str, Any]:
    batch = checkpoint.tokenizer()(part.texts, padding=True, return_tensors="pt")
    return dict(batch)


def test_sensitivity_is_the_mean_square_gradient_of_the_coefficients(
    bert: Checkpoint, full: Basis, customers: list[Examples]
) -> None:
    found = sensitivities(bert, full, customers, LOOK, "cpu")
    model = bert.load_model()
    adapters = attach(model, full)
    expected = {name: np.zeros(target) for name, target in full.ranks.items()}
    for part in customers:  # a batch takes all rows of a file, in any order
        targets = torch.tensor([LABELS.index(str(label)) for label in part.labels])
        model(**encoded(bert, part), labels=targets).loss.backward()
        for name, adapter in adapters.items():
            assert adapter.u.grad is not None
            norms = np.linalg.norm(adapter.r.double().numpy(), axis=1)
            expected[name] += (adapter.u.grad.double().numpy() / norms) ** 2 / len(customers)
            adapter.u.grad = None
    for name, values in expected.items():
        assert values.max() > 1e-6
        np.testing.assert_allclose(found[name], values, rtol=2e-3, atol=1e-5 * values.max())


def test_second_moments_are_those_of_the_hidden_states(bert: Checkpoint, customers: list[Examples]) -> None:
    names = choose_targets(bert.skeleton(), ["query"])
    found = second_moments(bert, names, customers, LOOK, "cpu")
    model = bert.load_model()
    for layer, name in enumerate(names):
        rows = []
        for part in customers:
            batch = encoded(bert, part)
            states = model(**batch, output_hidden_states=True).hidden_states[layer]
            rows.append(states[batch["attention_mask"].bool()].detach().double().numpy())
        together = np.concatenate(rows)
        np.testing.assert_allclose(found[name], together.T @ together / len(together), rtol=1e-5, atol=1e-6)


def test_whitened_factors_are_lapacks_and_give_the_weights_back(bert: Checkpoint, customers: list[Examples]) -> None:
    names = choose_targets(bert.skeleton(), TARGETS)
    random = np.random.default_rng(0)
    moments = {}
    for name in names:
        width = read_weight(bert, name).shape[1]
        inputs = random.normal(size=(4 * width, width)) * np.logspace(0, -2, width)
        moments[name] = inputs.T @ inputs / len(inputs)
    basis = factorize(bert, names, EnergyShare(1.0), moments=moments)
    for target in basis.targets:
        weight = read_weight(bert, target.name).double().numpy()
        root = scipy.linalg.sqrtm(moments[target.name])
        q, r, _ = scipy.linalg.qr(weight @ root, mode="economic", pivoting=True)
        np.testing.assert_allclose(target.diagonal, np.abs(np.diag(r)), rtol=1e-5, atol=1e-6)
        signs = np.sign((q[:, : target.rank] * target.q).sum(axis=0))
        np.testing.assert_allclose(target.q, q[:, : target.rank] * signs, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(target.q.astype(np.float64) @ target.r, weight, rtol=0, atol=2e-6)
    attach(bert.load_model(), basis)


def test_weighting_measures_a_weight_by_its_answers() -> None:
    random = np.random.default_rng(1)
    weight, inputs = torch.tensor(random.normal(size=(5, 7))), random.normal(size=(50, 7))
    found = weighted(weight, inputs.T @ inputs / 50)
    answers = inputs @ weight.numpy().T
    assert float(found.square().sum()) == pytest.approx((answers**2).sum(axis=1).mean(), rel=1e-12)
    with pytest.raises(InputError, match=r"a finite \[7, 7\]"):
        weighted(weight, np.eye(5))


def test_the_most_sensitive_directions_are_kept(
    bert: Checkpoint, full: Basis, customers: list[Examples], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": customers, "batches": 2, "max_length": 32}
    basis = qr.factorize(bert, targets=TARGETS, budget=20, spread="sensitivity", **options)
    look = Observation(batches=2, max_length=32)
    scores = sensitivities(bert, full, customers, look, "cpu")
    least = np.sort(np.concatenate(list(scores.values())))[-20]
    kept = {name: np.flatnonzero(values >= least) for name, values in scores.items()}
    assert basis.total_rank == 20 and basis.ranks == {name: len(part) for name, part in kept.items() if len(part)}
    wholes = {target.name: target for target in full.targets}
    for target in basis.targets:
        whole, own = wholes[target.name], kept[target.name]
        np.testing.assert_allclose(target.q, whole.q[:, own], **BASIS_FP32)
        np.testing.assert_allclose(target.r, whole.r[own], **BASIS_FP32)
        energies = whole.diagonal.astype(np.float64) ** 2
        assert target.energy == pytest.approx(energies[own].sum() / energies.sum())
    basis.save(tmp_path / "chosen.safetensors")
    rule = qr.Basis.load(tmp_path / "chosen.safetensors").rule
    assert rule == SensitivityBudget(20, look.seen(customers)) == basis.rule
    assert [file.digest for file in rule.seen.files] == [part.digest for part in customers]
    assert str(rule) == "20 directions, by sensitivity on 2 batches of acme, umbrella"
    with pytest.raises(InputError, match="needs data"):
        rule.choose({"a": np.ones(3)})


def test_a_basis_by_data_from_the_command_line(tiny_base: Path, tmp_path: Path) -> None:
    rows = [f"{text}\t{LABELS[0]}" for text in SENTENCES]
    (tmp_path / "acme.tsv").write_text("\n".join(["text\tlabel", *rows]), "utf-8")
    looked = ["--data", "acme.tsv", "--batches", 1, "--max-length", 16, "--budget", 9, "-o", "basis.safetensors"]
    succeed_here(["factorize", tiny_base, "--spread", "sensitivity", "--whiten", *looked], tmp_path)
    shown = succeed_here(["inspect", "basis.safetensors"], tmp_path)
    assert shown["rule"] == "9 directions, by sensitivity on 1 batches of acme.tsv"
    assert shown["weighting"] == "1 batches of acme.tsv" and shown["total_rank"] == 9
    (tmp_path / "texts.tsv").write_text("\n".join(["text", *SENTENCES]), "utf-8")
    basis = qr.factorize(tiny_base, tau=0.3, whiten=True, data=tmp_path / "texts.tsv", batches=1, max_length=16)
    assert basis.weighting is not None and basis.weighting.files[0].rows == len(SENTENCES)


def test_labels_that_the_head_does_not_know_are_refused_before_a_weight_is_factorized(
    bert: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("qrlora_deploy.api.factorizing.factorize_layers")
    strange = Examples(["pay the rent"], None, ["astrology"], "acme")
    with pytest.raises(InputError, match="unknown label 'astrology'.*`warmup`, or choose another spread"):
        qr.factorize(bert, budget=9, spread="sensitivity", data=strange, batches=1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budget": 9, "spread": "sensitivity"}, "spread='sensitivity' needs data"),
        ({"whiten": True}, "whiten=True needs data"),
        ({"spread": "sensitivity", "data": ["x.tsv"]}, "needs budget, the number of directions"),
        ({"budget": 9, "data": ["x.tsv"]}, "data does nothing unless there is spread='sensitivity' or whiten=True"),
        ({"budget": 9, "whiten": True, "data": ["x.tsv"], "batches": 0}, "batches must be at least 1"),
    ],
)
def test_data_that_are_missing_or_idle_are_refused(tiny_base: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        qr.factorize(tiny_base, **asked)


def test_every_file_is_looked_at_and_no_row_twice_in_a_batch(customers: list[Examples]) -> None:
    with pytest.raises(InputError, match="batches=1 must be at least the number of files, 2"):
        Observation(batches=1).seen(customers)
    rows = [[{"id": file * 10 + row} for row in range(count)] for file, count in enumerate((5, 3))]
    batches = [[row["id"] for row in batch] for batch in Observation(batches=6, batch_size=3).rows(rows)]
    assert [sorted({number // 10 for number in batch}) for batch in batches] == [[0], [1]] * 3
    assert all(len(set(batch)) == 3 for batch in batches)
    assert set(sum(batches[::2], [])) == set(range(5))
