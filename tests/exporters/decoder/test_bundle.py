"""Bundles of decoders: exported, opened and verified again without PyTorch, or refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.onnx.decoder import layer
from exporters.onnx.exporter import EXPORTER
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.errors import BasisMismatchError, CheckFailed, InputError, ProviderError
from qrlora_deploy.exporting.job import ExportJob, Original
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.runtime import Predictor, open_bundle
from qrlora_deploy.runtime.verification import alone
from tests.decoders import make_basis, make_customers, save_bundle, save_tiny
from tests.tiny import save_base


def customer_of(checkpoint: Checkpoint, basis: Basis) -> Coefficients:
    values = 0.3 * make_customers(basis)[1]
    return Coefficients(values, basis.digest, checkpoint.name, checkpoint.digest, checkpoint.task, ())


@pytest.fixture
def base(tmp_path: Path) -> tuple[Checkpoint, Basis]:
    checkpoint = save_tiny(tmp_path / "base")
    return checkpoint, make_basis(checkpoint)


def test_a_switchable_bundle(base: tuple[Checkpoint, Basis], tmp_path: Path) -> None:
    folder = save_bundle(tmp_path / "bundle", *base)
    manifest = open_bundle(folder).manifest
    assert (manifest.kind, manifest.task, manifest.max_length) == ("switchable", "text-generation", 128)
    assert manifest.parity.max_abs_error < manifest.parity.bound < manifest.customer_effect / 1000
    assert [record.name for record in manifest.outputs][:2] == ["logits", "present.0.key"]
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "model.onnx.data"):
        assert name in manifest.files
    code = (
        "import sys; from pathlib import Path; from exporters.onnx.exporter import EXPORTER\n"
        "verdict = EXPORTER.verify(Path(sys.argv[1]), None, 'cpu')\n"
        "assert verdict.failure is None and verdict.facts['rows'] == 4, verdict\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_a_merged_bundle(base: tuple[Checkpoint, Basis], tmp_path: Path) -> None:
    checkpoint, basis = base
    customer = customer_of(checkpoint, basis)
    EXPORTER.export(ExportJob(checkpoint, basis, tmp_path / "bundle", customer), OnnxOptions())
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.kind, manifest.coefficients_digest) == ("merged", customer.digest)
    assert manifest.customer_effect > 1000 * manifest.parity.bound
    assert "coefficient_table" not in {record.name for record in manifest.inputs}
    assert EXPORTER.verify(tmp_path / "bundle", None, "cpu").failure is None
    original = Original(checkpoint, basis, customer)
    assert EXPORTER.verify(tmp_path / "bundle", original, "cpu").failure is None
    with pytest.raises(BasisMismatchError, match="coefficients"):
        other = replace(customer, values=2 * customer.values)
        EXPORTER.verify(tmp_path / "bundle", replace(original, coefficients=other), "cpu")


def test_a_customer_is_verified_anew(base: tuple[Checkpoint, Basis], tmp_path: Path) -> None:
    folder = save_bundle(tmp_path / "bundle", *base)
    original = Original(*base, customer_of(*base))
    assert EXPORTER.verify(folder, original, "cpu").failure is None
    nobody = replace(original.coefficients, values=np.zeros_like(original.coefficients.values))
    with pytest.raises(CheckFailed, match="does not move the logits"):
        EXPORTER.verify(folder, replace(original, coefficients=nobody), "cpu")


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"table_dtype": "fp16"}])
def test_half_precision(base: tuple[Checkpoint, Basis], options: dict[str, Any], tmp_path: Path) -> None:
    manifest = open_bundle(save_bundle(tmp_path / "bundle", *base, **options)).manifest
    assert manifest.precision == options.get("precision", "fp32")
    assert EXPORTER.verify(tmp_path / "bundle", None, "cpu").failure is None


def test_a_wrong_graph_is_refused(
    base: tuple[Checkpoint, Basis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = layer.rotary_tables
    # Angles that are right for the prompts, and wrong from some step on.
    monkeypatch.setattr(layer, "rotary_tables", lambda *a: tuple(np.minimum(t, t[50]) for t in whole(*a)))
    with pytest.raises(CheckFailed, match="logits differ from PyTorch"):
        save_bundle(tmp_path / "bundle", *base)
    assert not (tmp_path / "bundle").exists()


def test_rows_that_disturb_each_other_are_refused(
    base: tuple[Checkpoint, Basis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaking(alone.ForcedSteps):
        """From the seventh token on a row of a batch answers as its neighbour."""

        count = 0

        def run(self, ids: np.ndarray, *places: Any) -> np.ndarray:
            self.count += 1
            return np.roll(super().run(ids, *places), 1 if self.count > 6 else 0, axis=0)

    folder = save_bundle(tmp_path / "good", *base)
    monkeypatch.setattr(alone, "ForcedSteps", Leaking)
    told = r"row \d of 'right padding' writes another token (7|8|9) than it does alone"
    with pytest.raises(CheckFailed, match=told):
        save_bundle(tmp_path / "bundle", *base)
    assert not (tmp_path / "bundle").exists()
    failure = EXPORTER.verify(folder, None, "cpu").failure
    assert isinstance(failure, CheckFailed) and "than it does alone" in str(failure)


def test_how_many_tokens_rows_write_alone() -> None:
    assert alone.tokens_for(10**6, 4, 40, 8192) == alone.MOST_TOKENS
    assert alone.tokens_for(10**6, 4, 40, 64) == 24
    assert alone.tokens_for(4 * 10**9, 4, 40, 8192) == alone.MOST_BYTES // (20 * 10**9)
    assert alone.tokens_for(10**12, 4, 40, 8192) == alone.LEAST_TOKENS


def test_changed_weights_are_noticed(base: tuple[Checkpoint, Basis], tmp_path: Path) -> None:
    folder = save_bundle(tmp_path / "bundle", *base)
    file = folder / "model.onnx.data"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx\.data was changed"):
        EXPORTER.verify(folder, None, "cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_labels": 3}, InputError, "head_labels is not for decoders"),
        ({"padding_free": True}, InputError, "padding_free is not for decoders"),
        ({"task": "embedding"}, InputError, "task is not for decoders"),
        ({"provider": "cuda"}, ProviderError, "cuda has no attention with a cache in fp32"),
        ({"precision": "int4", "provider": "cuda"}, InputError, "int4 is for the CPU"),
    ],
)
def test_options_that_are_not_for_decoders(
    base: tuple[Checkpoint, Basis], options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        save_bundle(tmp_path / "bundle", *base, **options)
    assert not (tmp_path / "bundle").exists()


def test_a_basis_of_another_base_is_refused(base: tuple[Checkpoint, Basis], tmp_path: Path) -> None:
    checkpoint, basis = base
    first = replace(basis.targets[0], weight_digest="0" * 64)
    with pytest.raises(BasisMismatchError, match="other weights"):
        save_bundle(tmp_path / "bundle", checkpoint, replace(basis, targets=(first, *basis.targets[1:])))


def test_how_text_is_generated_comes_along(base: tuple[Checkpoint, Basis], tmp_path: Path) -> None:
    checkpoint, basis = base
    (checkpoint.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5], "temperature": 0.4}))
    folder = save_bundle(tmp_path / "bundle", checkpoint, basis)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [3, 5]


def test_data_of_the_check_may_be_prompts_and_answers(base: tuple[Checkpoint, Basis], tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "please transfer money to", "completion": " my sister"}))
    data = read_examples(str(file), None, None, labelled=False)
    manifest = open_bundle(save_bundle(tmp_path / "bundle", *base, data=data)).manifest
    assert manifest.parity.max_abs_error < manifest.parity.bound


def test_int4_is_for_decoders_alone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_base(tmp_path / "base")))
    basis = make_basis(checkpoint, ("query",))
    with pytest.raises(InputError, match="int4 is for decoders"):
        EXPORTER.export(ExportJob(checkpoint, basis, tmp_path / "bundle"), OnnxOptions(precision="int4"))


def test_a_decoder_predicts_no_labels(base: tuple[Checkpoint, Basis], tmp_path: Path) -> None:
    folder = save_bundle(tmp_path / "bundle", *base)
    with pytest.raises(InputError, match="is a decoder, which writes text; ask it by `generate`"):
        Predictor(open_bundle(folder))
