"""`describe` names every kind of file and folder, reads it whole, and refuses what is none of them."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError
from qrlora_deploy.factorization.decomposition import update
from qrlora_deploy.formats.basis import Basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.inspection.describe import describe
from qrlora_deploy.merging.checkpoints import merge
from qrlora_deploy.models.checkpoint import open_checkpoint
from tests.tiny import LABELS, SENTENCES


def test_a_basis(tiny_basis: Basis, tiny_basis_file: Path) -> None:
    found = describe(tiny_basis_file)
    assert (found.kind, found.size_bytes) == ("basis", tiny_basis_file.stat().st_size)
    assert found.facts["digest"] == tiny_basis.digest and found.facts["rule"] == "tau 0.5"
    assert found.facts["coefficient_bytes"] == 4 * tiny_basis.total_rank
    assert [row["name"] for row in found.targets] == tiny_basis.names
    assert sum(row["rank"] for row in found.targets) == found.facts["total_rank"] == tiny_basis.total_rank
    for row in found.targets:
        assert row["shape"] == [32, 32] and 0.5 <= row["energy"] <= 1.0 and row["condition"] >= 1.0


def test_coefficients_with_their_basis(
    tiny_basis: Basis, tiny_customer: Coefficients, tiny_customer_file: Path
) -> None:
    found = describe(tiny_customer_file)
    assert found.kind == "coefficients" and found.facts["basis_found"] is True
    assert found.basis is not None and found.basis.digest == tiny_basis.digest
    assert found.coefficients is not None and found.coefficients.digest == tiny_customer.digest
    assert found.facts["labels"] == list(LABELS) and found.facts["training"] == {"seed": 7}
    assert found.facts["largest"] == float(np.abs(tiny_customer.values).max())
    assert {row["name"]: row["rank"] for row in found.targets} == tiny_basis.ranks
    parts = tiny_basis.split(tiny_customer.values)
    for row, target in zip(found.targets, tiny_basis.targets, strict=True):
        whole = np.linalg.norm(update(target.q, parts[target.name], target.r))
        # Q is orthonormal to the rounding of fp32.
        np.testing.assert_allclose(row["update_norm"], whole, rtol=1e-6, atol=0.0)
    # The layers' norms make up the whole one.
    whole = np.sqrt(sum(row["norm"] ** 2 for row in found.targets))
    np.testing.assert_allclose(found.facts["norm"], whole, rtol=1e-12, atol=0.0)


def test_coefficients_without_a_basis_are_still_read(tiny_customer: Coefficients, tmp_path: Path) -> None:
    lost = replace(tiny_customer, basis_file="gone.safetensors")
    write_coefficients(lost, tmp_path / "lost.safetensors")
    found = describe(tmp_path / "lost.safetensors")
    assert (found.kind, found.facts["basis_found"], found.targets, found.basis) == ("coefficients", False, (), None)


def test_a_wrong_basis_that_was_named_is_refused(tiny_basis: Basis, tiny_customer_file: Path, tmp_path: Path) -> None:
    # As many coefficients in another order: only the digest tells it apart.
    write_basis(replace(tiny_basis, targets=tiny_basis.targets[::-1]), tmp_path / "other.safetensors")
    with pytest.raises(BasisMismatchError, match="was trained on basis"):
        describe(tiny_customer_file, tmp_path / "other.safetensors")


def test_a_checkpoint(tiny_base: Path) -> None:
    found = describe(tiny_base)
    assert found.kind == "checkpoint" and found.targets == ()
    assert found.facts["architecture"] == "BertForSequenceClassification"
    assert found.facts["labels"] == list(LABELS) and found.facts["has_task_head"] is True
    assert found.facts["digest"] == open_checkpoint(str(tiny_base)).digest
    assert found.size_bytes == sum(file.stat().st_size for file in tiny_base.iterdir())


def test_a_merged_checkpoint(tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path) -> None:
    merge(open_checkpoint(str(tiny_base)), tiny_basis, tiny_customer, tmp_path / "merged")
    found = describe(tmp_path / "merged")
    assert found.kind == "merged checkpoint" and found.facts["basis_digest"] == tiny_basis.digest
    assert found.facts["coefficients_digest"] == tiny_customer.digest
    assert {row["name"]: row["rank"] for row in found.targets} == tiny_basis.ranks


def test_a_bundle(tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path) -> None:
    from exporters.onnx import export_merged
    from exporters.onnx.options import OnnxOptions
    from qrlora_deploy.exporting.job import ExportJob

    texts = Examples(list(SENTENCES), None, ["travel"] * len(SENTENCES), "sentences")
    export_merged(
        ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "bundle", tiny_customer),
        OnnxOptions(data=texts),
    )
    found = describe(tmp_path / "bundle")
    assert found.kind == "bundle" and found.facts["bundle_kind"] == "merged"
    assert {row["name"]: row["rank"] for row in found.targets} == tiny_basis.ranks
    (tmp_path / "bundle" / "tokenizer.json").write_text("{}")
    with pytest.raises(FileFormatError, match="tokenizer.json was changed"):
        describe(tmp_path / "bundle")


def test_what_is_nothing_of_ours_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors here")
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "plain.safetensors")
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "odd.safetensors", {"qrlora": "{"})
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    messages = {
        "none": "no such file or folder",
        "text.safetensors": "not a complete safetensors file",
        "plain.safetensors": "no file of this project",
        "odd.safetensors": "metadata is not JSON",
        "empty": "it holds no config.json",
        "pipe": "is no plain file or folder",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message) as caught:
            describe(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("kind", ["basis", "coefficients"])
def test_a_damaged_file_is_refused_and_not_described(
    tiny_basis_file: Path, tiny_customer_file: Path, tmp_path: Path, kind: str
) -> None:
    content = bytearray((tiny_basis_file if kind == "basis" else tiny_customer_file).read_bytes())
    content[-3] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(FileFormatError, match="bad.safetensors"):
        describe(tmp_path / "bad.safetensors")
