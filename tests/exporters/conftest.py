"""The tiny bundles in every precision, each made once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from exporters.onnx import export_merged, export_switchable
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint

InPrecision = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def in_precision(
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    texts: Examples,
    tmp_path_factory: pytest.TempPathFactory,
) -> InPrecision:
    """From a kind, "merged" or "switchable", and a precision to a bundle like `exported` or `switchable`."""

    @cache
    def export(kind: str, precision: str) -> Path:
        output = tmp_path_factory.mktemp(precision) / kind
        checkpoint = open_checkpoint(str(tiny_base))
        if kind == "merged":
            export_merged(
                ExportJob(checkpoint, tiny_basis, output, tiny_customer), OnnxOptions(data=texts, precision=precision)
            )
        else:
            export_switchable(
                ExportJob(checkpoint, tiny_basis, output), OnnxOptions(data=texts, head_labels=6, precision=precision)
            )
        return output

    return export
