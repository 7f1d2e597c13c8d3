"""`qrlora-deploy verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrlora_deploy.cli.options import (
    basis_option,
    coefficients_option,
    column_options,
    common,
    provider_option,
)
from qrlora_deploy.cli.output import Output, plain
from qrlora_deploy.errors import CheckFailed
from qrlora_deploy.installation.parts import need

if TYPE_CHECKING:
    from qrlora_deploy.runtime.bundle.bundle import Bundle
    from qrlora_deploy.runtime.verification.parity import ParityReport


@click.command("verify")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@coefficients_option(required=False)
@basis_option(required=False)
@click.option("--base", help="With --coefficients: the base, a folder or hub name. May be left out where the one that the file names is found.")
@click.option("--data", help="With --coefficients: texts of your own to compare on.")
@column_options
@provider_option
@common
def command(
    bundle: Path,
    coefficients: Path | None,
    basis: Path | None,
    base: str | None,
    data: str | None,
    text_column: str | None,
    label_column: str | None,
    provider: str,
) -> Output:
    """Check BUNDLE: every file's digest, and its logits against PyTorch's on real text.

    PyTorch's logits are those that the bundle carries. With --coefficients they are computed anew
    from the base, the basis and the customer, on --data where that is given.
    Exit code 1 when an error is out of bounds.

    \b
    Examples:
      qrlora-deploy verify acme-bundle --provider cuda
      qrlora-deploy verify acme-bundle --coefficients acme.safetensors --data acme-test.tsv
    """
    if coefficients is None and (basis or base or data):
        raise click.UsageError("--basis, --base and --data need --coefficients, the customer to compare with")
    from qrlora_deploy.runtime.bundle.bundle import open_bundle
    from qrlora_deploy.runtime.verification.parity import verify

    opened = open_bundle(bundle)
    if coefficients is None:
        report = verify(opened, provider)
    else:
        report = _verify_anew(opened, coefficients, basis, base, data, (text_column, label_column), provider)
    return _output(report, bundle)


def _verify_anew(
    bundle: "Bundle",
    coefficients: Path,
    basis: Path | None,
    base: str | None,
    data: str | None,
    columns: tuple[str | None, str | None],
    provider: str,
) -> "ParityReport":
    need("export", "`verify --coefficients`")
    from exporters.onnx.verifying import verify_against
    from qrlora_deploy.data.examples import read_examples
    from qrlora_deploy.formats.coefficients import read_coefficients
    from qrlora_deploy.models.locating import locate_base, locate_basis

    texts = read_examples(data, *columns) if data else None
    customer = read_coefficients(coefficients)
    frozen = locate_basis(customer, coefficients, basis)
    return verify_against(bundle, locate_base(customer, coefficients, base), frozen, customer, texts, provider)


def _output(report: "ParityReport", bundle: Path) -> Output:
    failure = None
    try:
        report.raise_if_failed()
    except CheckFailed as error:
        failure = error
    verdict = "FAILED" if failure else "passed"
    return Output(plain(report) | {"passed": failure is None}, f"{bundle}: {verdict}", plain(report), failure=failure)
