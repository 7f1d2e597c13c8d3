"""From a checkpoint to a basis: the same every time, true to the weights, refused elsewhere, and the same on a GPU."""

import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2Model

from qrlora_deploy.errors import BasisMismatchError, InputError, ProviderError
from qrlora_deploy.factorization.decomposition import Factorization, factorize_weight, update
from qrlora_deploy.factorization.from_checkpoint import factorize, read_weight
from qrlora_deploy.formats.basis import Basis, read_basis, write_basis
from qrlora_deploy.models.adapter import attach
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.models.weight_files import SINGLE
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.energy_budget import EnergyBudget
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.even_budget import EvenBudget
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.rank_rules.unknown import UnknownRule
from tests.rank_rules.ranks import rank_of
from tests.tolerances import BASIS_FP32

FULL: dict[str, float] = {"rtol": 0.0, "atol": 2e-6}
"""`Q R` of all directions against `W`, both factors rounded to fp32: eps * sqrt(rank) * |W|, with |W| about 1."""


@pytest.fixture(scope="module")
def bert(tiny_base: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_base))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=9, n_embd=12, n_layer=2, n_head=2, n_positions=8)).save_pretrained(folder)
    return open_checkpoint(str(folder))


def names_of(checkpoint: Checkpoint) -> list[str]:
    return choose_targets(checkpoint.skeleton())


def test_the_same_weights_give_the_same_digest(bert: Checkpoint, tiny_basis: Basis, tmp_path: Path) -> None:
    again = factorize(bert, tiny_basis.names, EnergyShare(0.5))
    assert again.digest == tiny_basis.digest and again.versions == tiny_basis.versions
    write_basis(again, tmp_path / "basis.safetensors")
    assert read_basis(tmp_path / "basis.safetensors").digest == tiny_basis.digest
    assert factorize(bert, tiny_basis.names[::-1], EnergyShare(0.5)).digest != tiny_basis.digest
    assert factorize(bert, tiny_basis.names, EnergyShare(0.6)).digest != tiny_basis.digest


@pytest.mark.parametrize("fixture", ["bert", "gpt2"])
def test_all_directions_give_the_weights_back(fixture: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(fixture)
    basis = factorize(checkpoint, names_of(checkpoint), EnergyShare(1.0))
    for target in basis.targets:
        weight = read_weight(checkpoint, target.name).double().numpy()
        assert (target.q.shape[0], target.r.shape[1]) == weight.shape
        ones = np.ones(target.rank)
        np.testing.assert_allclose(update(target.q.astype(np.float64), ones, target.r), weight, **FULL)
    attach(checkpoint.load_model(), basis)


def test_the_factors_are_those_of_lapack_rounded_once(bert: Checkpoint, tiny_basis: Basis) -> None:
    for target in tiny_basis.targets:
        expected = factorize_weight(read_weight(bert, target.name).double().numpy())
        rank = rank_of(EnergyShare(0.5), expected.diagonal)
        assert target.rank == rank and 0.5 <= target.energy < 0.6
        np.testing.assert_allclose(target.q, expected.q[:, :rank], **BASIS_FP32)
        np.testing.assert_allclose(target.r, expected.r[:rank], **BASIS_FP32)
        np.testing.assert_allclose(target.diagonal, expected.diagonal, **BASIS_FP32)
        assert target.weight_digest == bert.tensor_digest(f"{target.name}.weight")


def test_progress_counts_every_weight(bert: Checkpoint, tiny_basis: Basis) -> None:
    seen: list[tuple[str, int, int]] = []
    factorize(bert, tiny_basis.names, EnergyShare(), progress=lambda *step: seen.append(step))
    assert seen == [("factorize", done, 4) for done in (1, 2, 3, 4)]


@dataclass(frozen=True)
class Budget:
    """A rule that sees all targets: of all energies together, the largest `total` ones are kept."""

    total: int

    kind: ClassVar[str] = "budget"
    per_target: ClassVar[bool] = False

    @property
    def parameters(self) -> dict[str, Any]:
        return {"total": self.total}

    def choose(self, diagonals: Mapping[str, np.ndarray]) -> dict[str, int]:
        everything = np.sort(np.concatenate([np.square(diagonal) for diagonal in diagonals.values()]))[::-1]
        least = everything[self.total - 1]
        return {name: max(1, int((np.square(diagonal) >= least).sum())) for name, diagonal in diagonals.items()}


@dataclass(frozen=True)
class Together(EnergyShare):
    """As `EnergyShare`, asked about all targets at once."""

    kind: ClassVar[str] = "together"
    per_target: ClassVar[bool] = False


def test_a_rule_may_see_all_targets_at_once(bert: Checkpoint, tiny_basis: Basis, tmp_path: Path) -> None:
    basis = factorize(bert, tiny_basis.names, Budget(40))
    wholes = [factorize_weight(read_weight(bert, name).double().numpy()) for name in tiny_basis.names]
    energies = sorted((float(value) ** 2 for whole in wholes for value in whole.diagonal), reverse=True)
    assert basis.total_rank == 40 and len(set(basis.ranks.values())) > 1
    for target, whole in zip(basis.targets, wholes, strict=True):
        # The next direction of no target is among the largest.
        assert whole.diagonal[target.rank - 1] ** 2 >= energies[39] > whole.diagonal[target.rank] ** 2
        np.testing.assert_allclose(target.q, whole.q[:, : target.rank], **BASIS_FP32)
    basis.save(tmp_path / "budget.safetensors")
    # Readers that do not have the rule say what it was.
    assert str(read_basis(tmp_path / "budget.safetensors").rule) == 'budget {"total": 40}, unknown to this version'


@pytest.mark.parametrize("rule", [EvenBudget(41), EnergyBudget(41), EnergyBudget(3)])
def test_a_budget_keeps_leading_directions_and_leaves_out_what_has_none(
    bert: Checkpoint, tiny_basis: Basis, tmp_path: Path, rule: EvenBudget | EnergyBudget
) -> None:
    seen: list[tuple[str, int, int]] = []
    basis = factorize(bert, tiny_basis.names, rule, progress=lambda *step: seen.append(step))
    wholes = {name: factorize_weight(read_weight(bert, name).double().numpy()) for name in tiny_basis.names}
    ranks = rule.choose({name: whole.diagonal for name, whole in wholes.items()})
    assert basis.total_rank == rule.total and basis.ranks == {name: rank for name, rank in ranks.items() if rank}
    for target in basis.targets:
        whole = wholes[target.name]
        np.testing.assert_allclose(target.q, whole.q[:, : target.rank], **BASIS_FP32)
        np.testing.assert_allclose(target.r, whole.r[: target.rank], **BASIS_FP32)
    assert seen[-1] == ("factorize", len(basis.targets), len(basis.targets))
    basis.save(tmp_path / "budget.safetensors")
    assert read_basis(tmp_path / "budget.safetensors").rule == rule
    attach(bert.load_model(), basis)


def test_two_passes_give_the_bits_of_one(bert: Checkpoint, gpt2: Checkpoint, tiny_basis: Basis) -> None:
    for checkpoint, names in ((bert, tiny_basis.names), (gpt2, names_of(gpt2))):
        seen: list[tuple[str, int]] = []
        two = factorize(checkpoint, names, Together(0.5), progress=lambda *step, seen=seen: seen.append(step[:2]))
        assert two.digest == factorize(checkpoint, names, EnergyShare(0.5)).digest
        counted = range(1, len(names) + 1)
        assert seen == [(what, done) for what in ("diagonals", "factorize") for done in counted]


def test_a_rule_for_each_target_is_asked_once_and_factors_are_made_once(
    bert: Checkpoint, tiny_basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> np.ndarray:
        raise AssertionError("a second pass")

    monkeypatch.setattr("qrlora_deploy.factorization.from_checkpoint.diagonal_of", refuse)
    assert factorize(bert, tiny_basis.names, EnergyShare(0.5)).digest == tiny_basis.digest


def test_a_rule_of_another_release_cannot_be_computed(bert: Checkpoint, tiny_basis: Basis) -> None:
    with pytest.raises(InputError, match="the rank rule 'budget' is unknown to this version"):
        factorize(bert, tiny_basis.names, UnknownRule("budget", {}))


def test_no_more_than_one_target_is_whole_at_a_time(
    bert: Checkpoint, tiny_basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Factorization]] = []

    def watched(weight: np.ndarray) -> Factorization:
        found = factorize_weight(weight)
        made.append(weakref.ref(found))
        most.append(sum(other() is not None for other in made))
        return found

    for rule in (EnergyShare(0.5), Together(0.5)):
        most: list[int] = []
        monkeypatch.setattr("qrlora_deploy.factorization.from_checkpoint.factorize_weight", watched)
        factorize(bert, tiny_basis.names, rule)
        assert len(most) == 4 and max(most) <= 2


def changed(bert: Checkpoint, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Checkpoint:
    shutil.copytree(bert.folder, folder)
    tensors = safetensors.torch.load_file(folder / SINGLE)
    name = "bert.encoder.layer.1.attention.self.value.weight"
    tensors[name] = change(tensors[name])
    safetensors.torch.save_file(tensors, folder / SINGLE, {"format": "pt"})
    return open_checkpoint(str(folder))


def test_the_basis_of_other_weights_is_refused(bert: Checkpoint, tiny_basis: Basis, tmp_path: Path) -> None:
    other = changed(bert, tmp_path / "other", lambda weight: weight + 1e-3)
    with pytest.raises(
        BasisMismatchError, match=r"1 of 4 targets differ \(bert.encoder.layer.1.attention.self.value\)"
    ):
        check_basis_fits(other, tiny_basis)
    basis = factorize(other, tiny_basis.names, EnergyShare(0.5))
    assert basis.digest != tiny_basis.digest
    assert [basis.targets[index].weight_digest == tiny_basis.targets[index].weight_digest for index in range(4)] == [
        True,
        True,
        True,
        False,
    ]
    relabelled = replace(tiny_basis, targets=basis.targets[:3] + tiny_basis.targets[3:])
    with pytest.raises(BasisMismatchError):
        check_basis_fits(other, relabelled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.fill_(float("nan")), "layer.1.attention.self.value: the weight holds NaN or Inf"),
        (
            lambda weight: weight.to(torch.int8),
            r"self.value.weight is stored as I8 \[32, 32\]; an unquantised",
        ),
        (
            lambda weight: weight.to(torch.float8_e4m3fn),
            r"is stored as F8_E4M3 \[32, 32\]; an unquantised",
        ),
        (lambda weight: weight.flatten(), r"self.value.weight is \[1024\], but \[32, 32\] by config.json"),
    ],
)
def test_weights_that_cannot_be_factorized_are_named(
    bert: Checkpoint, tiny_basis: Basis, tmp_path: Path, change: Callable, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        factorize(changed(bert, tmp_path / "bad", change), tiny_basis.names, EnergyShare())


def test_bf16_weights_are_factorized_as_they_are(bert: Checkpoint, tiny_basis: Basis, tmp_path: Path) -> None:
    half = changed(bert, tmp_path / "half", lambda weight: weight.bfloat16())
    target = factorize(half, tiny_basis.names, EnergyShare(1.0)).targets[3]
    weight = half.read("bert.encoder.layer.1.attention.self.value.weight").double().numpy()
    np.testing.assert_allclose(target.q.astype(np.float64) @ target.r, weight, **FULL)


def test_devices_that_are_not_there_are_refused(
    bert: Checkpoint, tiny_basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProviderError, match="device='cuda' was asked for, but PyTorch finds no CUDA device"):
        factorize(bert, tiny_basis.names, EnergyShare(), device="cuda")
    with pytest.raises(InputError, match="device must be cpu or cuda, not tpu"):
        factorize(bert, tiny_basis.names, EnergyShare(), device="tpu")


def test_weights_larger_than_the_gpu_are_factorized_on_the_host(
    bert: Checkpoint, tiny_basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1000))
    assert factorize(bert, tiny_basis.names, EnergyShare(0.5), device="cuda").digest == tiny_basis.digest


def test_a_missing_layer_is_named(bert: Checkpoint) -> None:
    with pytest.raises(InputError, match=r"no weight for the layer bert\.encoder\.layer\.5\.output\.dense"):
        factorize(bert, ["bert.encoder.layer.5.output.dense"], EnergyShare())


@pytest.mark.gpu
@pytest.mark.parametrize("fixture", ["bert", "gpt2"])
@pytest.mark.parametrize("rule", [EnergyShare(0.5), EnergyShare(1.0), FixedRank(5), Together(0.5), Budget(90)], ids=str)
def test_a_gpu_gives_the_basis_of_the_cpu(fixture: str, rule: RankRule, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(fixture)
    names = names_of(checkpoint)
    cpu, gpu = factorize(checkpoint, names, rule), factorize(checkpoint, names, rule, device="cuda")
    assert gpu.names == cpu.names and gpu.ranks == cpu.ranks
    for one, other in zip(cpu.targets, gpu.targets, strict=True):
        assert other.weight_digest == one.weight_digest
        # The pivots are where the last row of R above its diagonal is zero; equal factors mean equal pivots.
        np.testing.assert_allclose(other.q, one.q, rtol=0, atol=1e-6)
        np.testing.assert_allclose(other.r, one.r, rtol=0, atol=1e-6)
        energies = [np.cumsum(np.square(t.diagonal, dtype=np.float64)) for t in (one, other)]
        # After the cast to fp32 the fp64 tolerance no longer holds; half a unit of fp32 does.
        np.testing.assert_allclose(energies[1] / energies[1][-1], energies[0] / energies[0][-1], rtol=0, atol=1e-6)
        weight = read_weight(checkpoint, one.name).double().numpy()
        squares = np.square(factorize_weight(weight).diagonal)
        assert other.energy == pytest.approx(squares[: one.rank].sum() / squares.sum(), rel=0, abs=1e-6)
