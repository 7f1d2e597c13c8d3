"""Customers on another basis, and on another base."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import qrlora_deploy as qr
from qrlora_deploy.cli import cli
from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from tests.projection.test_projecting import logits
from tests.tolerances import FP32_SIDE_BRANCH


@pytest.fixture(scope="module")
def customers(tiny_customer: Coefficients, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two customers of the tiny basis."""
    folder = tmp_path_factory.mktemp("customers")
    tiny_customer.save(folder / "acme.safetensors")
    qr.combine([(tiny_customer, -0.5)]).save(folder / "umbrella.safetensors")
    return folder


def test_a_wider_basis_holds_customers_whole(
    customers: Path, tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    wider = qr.factorize(tiny_base, tau=1.0, targets=("query", "value"))
    assert wider.total_rank > tiny_basis.total_rank
    done = qr.rebase(customers, wider, tmp_path / "moved", basis=tiny_basis)
    assert [(one.customer, one.refused) for one in done] == [("acme", ""), ("umbrella", "")]
    assert all(one.share == pytest.approx(1) for one in done)
    models = [open_checkpoint(str(tiny_base)).load_model() for _ in range(2)]
    qr.load_customer(models[0], tiny_basis, customers / "acme.safetensors")
    qr.load_customer(models[1], wider, tmp_path / "moved" / "acme.safetensors")
    torch.testing.assert_close(logits(models[1]), logits(models[0]), **FP32_SIDE_BRANCH)


def test_a_narrower_basis_says_what_it_holds_and_a_run_goes_on(
    customers: Path, tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    narrow = qr.factorize(tiny_base, tau=0.2, targets=("query", "value"))
    moved = tmp_path / "moved"
    done = qr.rebase(customers, narrow, moved, basis=tiny_basis)
    assert all(one.share is not None and 0 < one.share < 0.999 for one in done)
    found = qr.Coefficients.load(moved / "acme.safetensors")
    old = qr.Coefficients.load(customers / "acme.safetensors")
    before, after = tiny_basis.split(old.values), narrow.split(found.values)
    whole = lost = 0.0
    for one, other in zip(tiny_basis.targets, narrow.targets, strict=True):
        delta = (one.q * before[one.name]).astype(np.float64) @ one.r
        whole += np.square(delta).sum()
        lost += np.square(delta - (other.q * after[other.name]).astype(np.float64) @ other.r).sum()
    assert done[0].share == pytest.approx(1 - lost / whole, abs=1e-5)
    (moved / "umbrella.safetensors").unlink()
    written = (moved / "acme.safetensors").stat().st_mtime_ns
    assert qr.rebase(customers, narrow, moved, basis=tiny_basis) == done
    assert (moved / "acme.safetensors").stat().st_mtime_ns == written and (moved / "umbrella.safetensors").is_file()
    # What an earlier run was content with need not be enough for this one.
    again = qr.rebase(customers, narrow, moved, basis=tiny_basis, least_share=0.999)
    assert [one.share for one in again] == [one.share for one in done]
    assert all("less than 0.999" in one.refused and "is there from an earlier run" in one.refused for one in again)


def test_another_base_takes_customers_and_keeps_their_updates(
    customers: Path, tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    model = open_checkpoint(str(tiny_base)).load_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001 * torch.ones_like(parameter))
    model.save_pretrained(tmp_path / "second")
    second = qr.factorize(tmp_path / "second", tau=1.0, targets=("query", "value"))
    with pytest.raises(InputError, match=r"made from other weights.*give its base by base"):
        qr.rebase(customers, second, tmp_path / "none", basis=tiny_basis)
    with pytest.raises(BasisMismatchError, match="made from other weights than"):
        qr.rebase(customers, second, tmp_path / "none", base=tiny_base)
    assert not (tmp_path / "none").exists()
    done = qr.rebase(customers, second, tmp_path / "moved", basis=tiny_basis, base=tmp_path / "second")
    assert all(one.share is not None and one.share > 0.5 for one in done)
    found = qr.Coefficients.load(tmp_path / "moved" / "acme.safetensors")
    assert found.base_digest == open_checkpoint(str(tmp_path / "second")).digest


def test_the_command_refuses_customers_below_the_share(
    customers: Path, tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    narrow = qr.factorize(tiny_base, tau=0.1, targets=("query", "value"))
    narrow.save(tmp_path / "narrow.safetensors")
    tiny_basis.save(tmp_path / "old.safetensors")
    (tmp_path / "in").mkdir()
    for file in customers.iterdir():
        (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "in" / "broken.safetensors").write_bytes(b"nothing")
    places = ["--to", str(tmp_path / "narrow.safetensors"), "--basis", str(tmp_path / "old.safetensors")]
    ran = CliRunner().invoke(
        cli, ["rebase", str(tmp_path / "in"), *places, "-o", str(tmp_path / "out"), "--least-share", "0.99"]
    )
    assert ran.exit_code == 1 and "3 of 3 customers were not written" in ran.output
    assert "broken" in ran.output and not list((tmp_path / "out").iterdir())
    same = CliRunner().invoke(cli, ["rebase", str(tmp_path / "in"), *places, "-o", str(tmp_path / "in")])
    assert same.exit_code == 2 and "holds the customers themselves" in same.output


def test_places_that_cannot_be_meant_are_refused_at_once(
    customers: Path, tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for source, output, said in (
        (tmp_path / "notes.txt", "moved", "notes.txt is no customer's file; give one like acme.safetensors"),
        (customers, "notes.txt", "notes.txt is a file; give the name of a folder to output"),
        (customers, "notes.txt/moved", "cannot be made: Not a directory"),
    ):
        with pytest.raises(InputError, match=said):
            qr.rebase(source, tiny_basis, tmp_path / output, basis=tiny_basis)
    for share in (float("nan"), 2.0, -0.1):
        with pytest.raises(InputError, match=r"least_share=.* must be between 0 and 1"):
            qr.rebase(customers, tiny_basis, tmp_path / "moved", basis=tiny_basis, least_share=share)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_a_run_for_another_base_makes_its_own_files(
    customers: Path, tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    # The basis fits both: their targets are equal, and another tensor is not.
    model = open_checkpoint(str(tiny_base)).load_model()
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(tmp_path / "second")
    moved = tmp_path / "moved"
    qr.rebase(customers, tiny_basis, moved, basis=tiny_basis)
    qr.rebase(customers, tiny_basis, moved, basis=tiny_basis, base=tmp_path / "second")
    found = qr.Coefficients.load(moved / "acme.safetensors")
    assert found.base_digest == open_checkpoint(str(tmp_path / "second")).digest
