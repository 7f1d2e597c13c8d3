"""`qrlora-deploy verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrlora_deploy.cli.exporter_options import DEFAULT, FORMAT
from qrlora_deploy.cli.options import (
    basis_option,
    coefficients_option,
    column_options,
    common,
    provider_option,
)
from qrlora_deploy.cli.output import Output, plain
from qrlora_deploy.errors import InputError
from qrlora_deploy.installation.parts import need

if TYPE_CHECKING:
    from qrlora_deploy.exporting.job import Original


@click.command("verify")
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@coefficients_option(required=False)
@basis_option(required=False)
@click.option(
    "--base",
    help="With --coefficients: the base, a folder or hub name. May be left out where the one of that name is found.",
)
@click.option("--data", help="With --coefficients: texts of your own to compare on.")
@click.option(FORMAT, default=DEFAULT, show_default=True, help="Name of the exporter that wrote BUNDLE.")
@column_options
@provider_option
@common
def command(
    bundle: Path,
    coefficients: Path | None,
    basis: Path | None,
    base: str | None,
    data: str | None,
    format: str,
    text_column: str | None,
    label_column: str | None,
    provider: str,
) -> Output:
    """Check BUNDLE: every file's digest, and its logits against PyTorch's on real text.

    PyTorch's logits are those that the bundle carries. With --coefficients they are computed anew
    from the base, the basis and the customer, on --data where that is given. With --format BUNDLE is
    what another exporter wrote, and its own check runs.
    Exit code 1 when an error is out of bounds.

    \b
    Examples:
      qrlora-deploy verify acme-bundle --provider cuda
      qrlora-deploy verify acme-bundle --coefficients acme.safetensors --data acme-test.tsv
    """
    if coefficients is None and (basis or base or data):
        raise click.UsageError("--basis, --base and --data need --coefficients, the customer to compare with")
    from qrlora_deploy.exporting.exporter import Verifier
    from qrlora_deploy.exporting.registry import faults_named, find_exporter

    exporter = find_exporter(format)
    if not isinstance(exporter, Verifier):
        raise InputError(f"{FORMAT} {format}: this exporter has no check of what it wrote, so there is no verify")
    original = None
    if coefficients is not None:
        original = _original(coefficients, basis, base, data, (text_column, label_column))
    with faults_named(format):
        verdict = exporter.verify(bundle, original, provider)
    passed = verdict.failure is None
    facts = plain(verdict.facts)
    headline = f"{bundle}: {'passed' if passed else 'FAILED'}"
    return Output(facts | {"passed": passed}, headline, facts, failure=verdict.failure)


def _original(
    coefficients: Path, basis: Path | None, base: str | None, data: str | None, columns: tuple[str | None, str | None]
) -> "Original":
    need("export", "`verify --coefficients`")
    from qrlora_deploy.data.examples import read_examples
    from qrlora_deploy.exporting.job import Original
    from qrlora_deploy.formats.coefficients import read_coefficients
    from qrlora_deploy.models.locating import locate_base, locate_basis

    texts = read_examples(data, *columns, labelled=False) if data else None
    customer = read_coefficients(coefficients)
    frozen = locate_basis(customer, coefficients, basis)
    return Original(locate_base(customer, coefficients, base), frozen, customer, texts)
