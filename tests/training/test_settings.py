"""The learning rate that nobody gave: it follows the number of coefficients, and is the same wherever it is read."""

import json
from pathlib import Path

import pytest

from qrlora_deploy.cli.options import BY_COEFFICIENTS
from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import read_coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.training.fleet.customers import FleetSource
from qrlora_deploy.training.fleet.options import FleetOptions
from qrlora_deploy.training.fleet.run import train_fleet
from qrlora_deploy.training.settings import (
    LARGEST_DEFAULT_RATE,
    LARGEST_STEP,
    STEP_LENGTH,
    TrainSettings,
    default_rate,
)
from qrlora_deploy.training.trainer import train
from tests.training.fleet.making import check_same, without_dropout, write_folders


@pytest.mark.parametrize(
    ("coefficients", "rate"), [(1, 0.3), (84, 0.3), (320, 0.154), (617, 0.111), (3047, 0.05), (12753, 0.0244)]
)
def test_the_default_falls_with_the_root_of_the_number_of_coefficients(coefficients: int, rate: float) -> None:
    assert default_rate(coefficients) == rate


@pytest.mark.parametrize(
    ("coefficients", "layers", "steps", "rate"),
    [(3047, 36, 141, 0.05), (3047, 36, 804, 0.0253), (12753, 72, 345, 0.0244), (648, 72, 804, 0.0179), (1, 1, 4, 0.3)],
)
def test_layers_and_steps_bound_it(coefficients: int, layers: int, steps: int, rate: float) -> None:
    assert default_rate(coefficients, 1.0, layers, steps) == rate
    assert default_rate(coefficients, 3.0, layers, steps) == pytest.approx(min(0.3, 3 * rate), rel=0.01)


def test_the_rate_of_settings_is_that_of_the_basis_unless_it_is_given(tiny_basis: Basis) -> None:
    # The last batch has one row.
    settings = TrainSettings(epochs=2, batch_size=3)
    assert settings.steps(2998) == 2000
    expected = default_rate(tiny_basis.total_rank, 1.0, len(tiny_basis.targets), 2000)
    assert settings.resolved(tiny_basis, rows=2998).rate == expected < default_rate(tiny_basis.total_rank)
    assert TrainSettings(learning_rate=0.7).resolved(tiny_basis, rows=2998).rate == 0.7


def test_the_help_tells_the_numbers_of_the_library() -> None:
    told = f"{STEP_LENGTH} / sqrt(number of coefficients), at most {LARGEST_STEP} / sqrt(adapted layers x steps)"
    assert f"{told}, at most {LARGEST_DEFAULT_RATE}" == BY_COEFFICIENTS


def test_a_rate_that_is_not_known_yet_is_not_guessed() -> None:
    with pytest.raises(RuntimeError, match="depends on basis and rows"):
        _ = TrainSettings().rate
    with pytest.raises(InputError, match="learning_rate must be above 0"):
        TrainSettings(learning_rate=0.0)


def test_a_run_and_a_fleet_record_the_number_and_resume_by_it(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(without_dropout(tiny_base, tmp_path / "base")))
    expected = default_rate(tiny_basis.total_rank)
    settings = TrainSettings(epochs=2, batch_size=4, max_length=16, device="cpu")
    given = TrainSettings(epochs=2, batch_size=4, max_length=16, device="cpu", learning_rate=expected)
    other = TrainSettings(epochs=2, batch_size=4, max_length=16, device="cpu", learning_rate=0.5 * expected)
    name = write_folders(tmp_path, sizes=[(8, 4)])[0]
    examples = read_examples(tmp_path / "data" / f"{name}.tsv")

    alone = train(checkpoint, tiny_basis, examples, None, settings, tmp_path / "work")
    assert alone.training["learning_rate"] == expected
    assert json.loads((tmp_path / "work" / "settings.json").read_text())["learning_rate"] == expected
    # The same number given by hand is the same run; another one is not.
    train(checkpoint, tiny_basis, examples, None, given, tmp_path / "work", resume=True)
    with pytest.raises(InputError, match=r"other settings \(learning_rate\)"):
        train(checkpoint, tiny_basis, examples, None, other, tmp_path / "work", resume=True)

    source, options = FleetSource(tmp_path / "data"), FleetOptions(tmp_path / "out", resume=True)
    statuses = []
    for part in (settings, given, other):
        statuses.append(train_fleet(checkpoint, tiny_basis, source, part, options).lines[0].status)
        if part is settings:
            check_same(read_coefficients(tmp_path / "out" / f"{name}.safetensors"), alone)
    assert statuses == ["trained", "skipped", "trained"]


def test_each_customer_of_a_fleet_has_the_rate_of_its_own_rows(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few rows, and the bound is what counts.
    monkeypatch.setattr("qrlora_deploy.training.settings.LARGEST_STEP", 0.5)
    checkpoint = open_checkpoint(str(without_dropout(tiny_base, tmp_path / "base")))
    settings = TrainSettings(epochs=2, batch_size=4, max_length=16, device="cpu")
    names = write_folders(tmp_path, sizes=[(3, 2), (30, 2)])
    train_fleet(checkpoint, tiny_basis, FleetSource(tmp_path / "data"), settings, FleetOptions(tmp_path / "out"))
    rates = []
    for name, steps in zip(names, (2, 16), strict=True):
        found = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        examples = read_examples(tmp_path / "data" / f"{name}.tsv")
        check_same(found, train(checkpoint, tiny_basis, examples, None, settings, tmp_path / name))
        assert found.training["steps"] == steps
        rates.append(found.training["learning_rate"])
    assert rates[0] / rates[1] == pytest.approx(8**0.5, rel=0.01)
