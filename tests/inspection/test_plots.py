"""Pictures are written whole, in the format that the name asks for, or not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.factorization.decomposition import update
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.inspection import plots as plotting
from qrlora_deploy.inspection.plots import check_plot_path, plot_basis, plot_coefficients

SIZE = (1800, 675)
"""12 by 4.5 inches at 150 dots an inch."""


def colours(path: Path) -> int:
    """How many different colours a picture has; an empty one has one."""
    with Image.open(path) as image:
        image.load()
        found = image.convert("RGB").getcolors(maxcolors=2**24)
    assert found is not None
    return len(found)


def test_a_basis_as_png(tiny_basis: Basis, tmp_path: Path) -> None:
    plot_basis(tiny_basis, tmp_path / "basis.png")
    with Image.open(tmp_path / "basis.png") as image:
        assert (image.format, image.size) == ("PNG", SIZE)
    assert colours(tmp_path / "basis.png") > 50
    assert [path.name for path in tmp_path.iterdir()] == ["basis.png"]


def test_a_picture_grows_with_its_layers(tiny_basis: Basis, tmp_path: Path) -> None:
    target = tiny_basis.targets[0]
    many = tuple(replace(target, name=f"layer{index}") for index in range(30))
    plot_basis(replace(tiny_basis, targets=many), tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as image:
        assert image.size == (1800, 990)


@pytest.mark.parametrize("known", [True, False])
def test_a_customer_with_and_without_its_basis(
    tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path, known: bool
) -> None:
    plot_coefficients(tiny_customer, tiny_basis if known else None, tmp_path / "acme.png")
    with Image.open(tmp_path / "acme.png") as image:
        assert (image.format, image.size) == ("PNG", SIZE)
    assert colours(tmp_path / "acme.png") > 20


def drawn(monkeypatch: pytest.MonkeyPatch, coefficients: Coefficients, basis: Basis | None, path: Path) -> Figure:
    """The figure that `plot_coefficients` saves."""
    figures: list[Figure] = []
    save = plotting._save
    monkeypatch.setattr(plotting, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    plot_coefficients(coefficients, basis, path)
    return figures[0]


def test_a_customer_shows_its_coefficients_and_the_norm_of_each_update(
    tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, bars, spread, _colours = drawn(monkeypatch, tiny_customer, tiny_basis, tmp_path / "a.png").axes
    parts = tiny_basis.split(tiny_customer.values)
    shown = np.ma.filled(grid.images[0].get_array(), np.nan)
    for row, (target, bar, curve) in enumerate(zip(tiny_basis.targets, bars.patches, spread.lines, strict=False)):
        part = parts[target.name]
        np.testing.assert_array_equal(shown[row, : len(part)], part)
        assert np.isnan(shown[row, len(part) :]).all()
        # Q is orthonormal to the rounding of fp32.
        assert bar.get_width() == pytest.approx(float(np.linalg.norm(update(target.q, part, target.r))), rel=1e-6)
        assert (curve.get_ydata()[0], curve.get_ydata()[-1]) == (0.0, pytest.approx(1.0, abs=1e-12))
    names = [label.get_text() for label in grid.get_yticklabels()]
    assert names == [name.removeprefix("bert.encoder.layer.") for name in tiny_basis.names]


def test_many_layers_and_a_customer_of_zeros_are_drawn(
    tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    targets = tuple(replace(tiny_basis.targets[0], name=f"encoder.{index}.query") for index in range(72))
    many = replace(tiny_basis, targets=targets)
    values = np.resize(tiny_customer.values, many.total_rank)
    plot_coefficients(replace(tiny_customer, values=values, basis_digest=many.digest), many, tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as image:
        assert image.size == (1800, 2376)
    plot_coefficients(replace(tiny_customer, values=0 * tiny_customer.values), tiny_basis, tmp_path / "zero.png")
    assert colours(tmp_path / "zero.png") > 20


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF-"), ("a.PNG", b"\x89PNG")])
def test_the_suffix_chooses_the_format(
    tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path, name: str, start: bytes
) -> None:
    plot_coefficients(tiny_customer, tiny_basis, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_another_suffix_is_refused_before_anything_is_written(
    tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    for plot in (
        lambda: check_plot_path(path),
        lambda: plot_basis(tiny_basis, path),
        lambda: plot_coefficients(tiny_customer, tiny_basis, path),
    ):
        with pytest.raises(InputError) as caught:
            plot()
        assert str(caught.value) == f"{path}: the name of a plot must end with .pdf, .png, .svg"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_and_a_wrong_basis_are_refused(
    tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="the folder .* does not exist"):
        plot_basis(tiny_basis, tmp_path / "none" / "a.png")
    other = replace(tiny_basis, targets=tiny_basis.targets[::-1])
    with pytest.raises(BasisMismatchError, match="were trained on basis"):
        plot_coefficients(tiny_customer, other, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_zeros_are_drawn_too(tiny_basis: Basis, tmp_path: Path) -> None:
    zero = replace(tiny_basis.targets[0], diagonal=0 * tiny_basis.targets[0].diagonal)
    plot_basis(replace(tiny_basis, targets=(zero,)), tmp_path / "zero.png")
    assert colours(tmp_path / "zero.png") > 20
