"""The exporter "onnx": bundles that are checked against PyTorch when they are written, and again when one asks."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from exporters.onnx.options import OnnxOptions
from qrlora_deploy.errors import CheckFailed
from qrlora_deploy.exporting.exporter import Verdict
from qrlora_deploy.exporting.job import ExportJob, Original


class OnnxExporter:
    """A switchable bundle, or with a customer a merged one."""

    name = "onnx"
    options = OnnxOptions
    output: Literal["file", "folder"] = "folder"
    needs_customer: bool | None = None
    shown = ("kind", "task", "labels", "precision", "calibration", "opset", "head_labels", "parity", "customer_effect")

    def export(self, job: ExportJob, options: OnnxOptions) -> Mapping[str, Any]:
        """The bundle's manifest; see `export_merged`, `export_switchable` and `export_decoder`."""
        if job.checkpoint.writes_text:
            from exporters.onnx.decoder.export import export_decoder

            return export_decoder(job, options).model_dump(mode="json")
        from exporters.onnx.export import export_merged, export_switchable

        export = export_switchable if job.coefficients is None else export_merged
        return export(job, options).model_dump(mode="json")

    def verify(self, output: Path, original: Original | None, provider: str) -> Verdict:
        """Every file's digest, and the graph's logits against those it carries or against PyTorch's anew.

        Raises:
            FileFormatError: the bundle is damaged. BasisMismatchError: it was made from something else.
            ProviderError: the provider does not load or cannot compute in the bundle's precision.
        """
        from qrlora_deploy.runtime.bundle.bundle import open_bundle
        from qrlora_deploy.runtime.verification.parity import verify

        bundle = open_bundle(output)
        if original is None:
            report = verify(bundle, provider)
        elif bundle.manifest.deciding_task.writes_text:
            from exporters.onnx.decoder.verifying import verify_decoder

            report = verify_decoder(bundle, original, provider)
        else:
            from exporters.onnx.verifying import verify_against

            report = verify_against(
                bundle, original.checkpoint, original.basis, original.coefficients, original.texts, provider
            )
        try:
            report.raise_if_failed()
        except CheckFailed as error:
            return Verdict(dataclasses.asdict(report), error)
        return Verdict(dataclasses.asdict(report))


EXPORTER = OnnxExporter()
