"""The digest, never the name, decides which basis and which base belong to a customer."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch

from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.formats.basis import Basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.locating import locate_base, locate_basis, recorded_place


@pytest.fixture
def other_basis(tiny_basis: Basis) -> Basis:
    """As many coefficients in another order: only the digest tells it apart."""
    return replace(tiny_basis, targets=tiny_basis.targets[::-1])


@pytest.fixture
def other_basis_file(other_basis: Basis, tmp_path: Path) -> Path:
    write_basis(other_basis, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is not that of the customer's file."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the customer's file would be; its folder holds a `shop`."""
    (tmp_path / "customers" / "shop").mkdir(parents=True)
    return tmp_path / "customers" / "acme.safetensors"


def test_a_place_is_recorded_relative_to_the_file(tmp_path: Path) -> None:
    place = recorded_place(tmp_path / "bases" / "b.safetensors", tmp_path / "customers" / "acme.safetensors")
    assert place == "../bases/b.safetensors"


@pytest.mark.parametrize(
    "where",
    [
        "customers/shop/basis.safetensors",
        "customers/basis.safetensors",
        "here/shop/basis.safetensors",
        "here/basis.safetensors",
    ],
)
def test_a_basis_is_found_beside_the_file_and_in_the_current_folder(
    tiny_basis: Basis, tiny_customer: Coefficients, file: Path, elsewhere: Path, tmp_path: Path, where: str
) -> None:
    (elsewhere / "shop").mkdir()
    write_basis(tiny_basis, tmp_path / where)
    customer = replace(tiny_customer, basis_file="shop/basis.safetensors")
    assert locate_basis(customer, file).digest == tiny_basis.digest


def test_the_digest_decides_among_files_of_the_same_name(
    tiny_basis: Basis, other_basis: Basis, tiny_customer: Coefficients, file: Path, elsewhere: Path
) -> None:
    customer = replace(tiny_customer, basis_file="shop/basis.safetensors")
    write_basis(other_basis, file.parent / "shop" / "basis.safetensors")
    (file.parent / "basis.safetensors").write_bytes(b"damaged")
    write_basis(tiny_basis, elsewhere / "basis.safetensors")
    assert locate_basis(customer, file).digest == tiny_basis.digest


def test_every_refused_candidate_is_named(
    other_basis: Basis, tiny_customer: Coefficients, file: Path, elsewhere: Path
) -> None:
    customer = replace(tiny_customer, basis_file="shop/basis.safetensors")
    write_basis(other_basis, file.parent / "shop" / "basis.safetensors")
    (elsewhere / "basis.safetensors").write_bytes(b"damaged")
    with pytest.raises(BasisMismatchError) as caught:
        locate_basis(customer, file)
    message = str(caught.value)
    assert message.startswith(
        f"{file} was trained on basis {customer.basis_digest[:12]} (shop/basis.safetensors), but "
    )
    assert f"{file.parent / 'shop' / 'basis.safetensors'} has digest {other_basis.digest[:12]}" in message
    assert "basis.safetensors is not a complete safetensors file" in message
    assert message.endswith("give the right one with basis") and "\n" not in message


@pytest.mark.parametrize(("recorded", "shown"), [("gone.safetensors", "gone.safetensors"), ("", "no name")])
def test_a_basis_that_is_nowhere_is_asked_for(
    tiny_customer: Coefficients, file: Path, elsewhere: Path, recorded: str, shown: str
) -> None:
    with pytest.raises(InputError, match=rf"\({shown}\), which is neither beside it.*with basis") as caught:
        locate_basis(replace(tiny_customer, basis_file=recorded), file)
    assert not isinstance(caught.value, BasisMismatchError)


def test_a_basis_that_is_given_is_the_only_one_looked_at(
    tiny_basis: Basis,
    tiny_basis_file: Path,
    other_basis: Basis,
    other_basis_file: Path,
    tiny_customer: Coefficients,
    file: Path,
) -> None:
    lost = replace(tiny_customer, basis_file="gone.safetensors")
    assert locate_basis(lost, file, tiny_basis_file).digest == tiny_basis.digest
    # The recorded basis is there and right: the user's choice is refused all the same.
    with pytest.raises(BasisMismatchError) as caught:
        locate_basis(tiny_customer, file, other_basis_file)
    assert str(caught.value) == (
        f"{file} was trained on basis {tiny_basis.digest[:12]}, but {other_basis_file} is basis "
        f"{other_basis.digest[:12]}; give the basis it was trained on, or train the customer again"
    )
    with pytest.raises(InputError, match="no such file"):
        locate_basis(tiny_customer, file, Path("none.safetensors"))


def test_coefficients_of_another_length_name_their_file(
    tiny_basis_file: Path, tiny_customer: Coefficients, file: Path
) -> None:
    short = replace(tiny_customer, values=tiny_customer.values[1:])
    with pytest.raises(InputError, match="acme.safetensors: coefficients do not fit the basis"):
        locate_basis(short, file, tiny_basis_file)


def changed_copy(base: Path, folder: Path) -> Path:
    """The base with one weight changed."""
    shutil.copytree(base, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["classifier.bias"] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_digest_decides_among_bases_of_the_same_name(
    tiny_base: Path, tiny_customer: Coefficients, file: Path, elsewhere: Path
) -> None:
    customer = replace(tiny_customer, base_name="models/base")
    wrong = changed_copy(tiny_base, file.parent / "base")
    with pytest.raises(BasisMismatchError) as caught:
        locate_base(customer, file)
    assert f"was trained on models/base with digest {customer.base_digest[:12]}, but {wrong} has " in str(caught.value)
    assert str(caught.value).endswith("give the right BASE")
    shutil.copytree(tiny_base, elsewhere / "models" / "base")
    assert locate_base(customer, file).digest == customer.base_digest


def test_a_base_that_is_given_must_be_the_right_one(
    tiny_base: Path, tiny_customer: Coefficients, file: Path, tmp_path: Path
) -> None:
    lost = replace(tiny_customer, base_name="gone")
    assert locate_base(lost, file, str(tiny_base)).folder == tiny_base
    wrong = changed_copy(tiny_base, tmp_path / "wrong")
    with pytest.raises(
        BasisMismatchError, match=rf"but {re.escape(str(wrong))} has [0-9a-f]{{12}}; give the base it was trained on"
    ):
        locate_base(tiny_customer, file, str(wrong))
    with pytest.raises(InputError, match="gone, which is not found; give BASE, a folder or a hub name"):
        locate_base(lost, file)


def test_the_hub_is_asked_only_where_nothing_local_has_the_name(
    tiny_base: Path, tiny_customer: Coefficients, file: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return str(tiny_base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    customer = replace(tiny_customer, base_name="owner/base")
    assert locate_base(customer, file).digest == customer.base_digest and asked == ["owner/base"]
    shutil.copytree(tiny_base, elsewhere / "base")
    assert locate_base(customer, file).folder == Path("base") and asked == ["owner/base"]


def test_a_recorded_name_that_no_file_can_have_is_not_found(tiny_customer: Coefficients, file: Path) -> None:
    customer = replace(tiny_customer, basis_file="x" * 5000, base_name="y" * 5000)
    with pytest.raises(InputError, match="neither beside it"):
        locate_basis(customer, file)
    with pytest.raises(InputError, match="is not found"):
        locate_base(customer, file)
