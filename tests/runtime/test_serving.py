"""Sessions, parity reports, predictions, and what serving is allowed to import."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from qrlora_deploy.errors import CheckFailed, FileFormatError, InputError, ProviderError
from qrlora_deploy.runtime import Predictor, open_bundle, open_session, verify
from qrlora_deploy.runtime.verification.parity import check_parity, customer_effect
from qrlora_deploy.runtime.verification.reference import read_reference
from qrlora_deploy.tasks.classification import Classification
from tests.tiny import LABELS, SENTENCES
from tests.tolerances import FP32_ONNX


def cuda_works() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def test_runtime_imports_neither_torch_nor_transformers(exported: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from qrlora_deploy.runtime import Predictor, open_bundle, verify\n"
        "bundle = open_bundle(Path(sys.argv[1])); verify(bundle).raise_if_failed()\n"
        "assert Predictor(bundle).predict(['play some music'])\n"
        "heavy = {'torch', 'transformers', 'onnx', 'scipy', 'optimum'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program, exported], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(cuda_works(), reason="this machine has a GPU, so nothing is refused")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_missing_gpu_is_refused_in_one_line(exported: Path, provider: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProviderError, match="provider='cpu'") as caught:
        open_session(exported / "model.onnx", provider)
    assert "\n" not in str(caught.value)
    shown = capfd.readouterr()
    assert shown.err == "" and shown.out == ""


def test_build_without_the_provider_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="no such provider"):
        open_session(exported / "model.onnx", "cuda")


def test_unknown_provider_lists_the_known(exported: Path) -> None:
    with pytest.raises(ProviderError, match="cpu, cuda, tensorrt"):
        open_session(exported / "model.onnx", "tpu")


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="cannot be opened"):
        open_session(tmp_path / "model.onnx")


def test_verify_repeats_the_check_of_the_export(exported: Path) -> None:
    bundle = open_bundle(exported)
    report = verify(bundle, threads=1)
    assert report.passed and report.label_agreement == 1.0
    assert report.bound == pytest.approx(bundle.manifest.parity.bound, rel=1e-6)
    assert customer_effect(read_reference(exported / "reference.safetensors")) == bundle.manifest.customer_effect


def test_failed_check_names_the_worst_row(exported: Path) -> None:
    cases = read_reference(exported / "reference.safetensors")
    wrong = cases[1].logits.copy()
    wrong[2, 0] += 0.5
    cases[1] = replace(cases[1], logits=wrong)
    report = check_parity(open_session(exported / "model.onnx"), cases, Classification())
    with pytest.raises(CheckFailed, match=r"max abs error 5\.0e-01 > .* worst: row 2 of 'right padding'"):
        report.raise_if_failed()


class NanSession:
    """Gives NaN, which every comparison would let through."""

    def get_inputs(self) -> list[object]:
        return []

    def run(self, names: list[str], inputs: dict[str, np.ndarray], options: object) -> list[np.ndarray]:
        return [np.full((len(inputs["input_ids"]), len(LABELS)), np.nan, np.float32)]


def test_nan_never_passes(exported: Path) -> None:
    report = check_parity(NanSession(), read_reference(exported / "reference.safetensors"), Classification())
    assert not report.passed


def test_damaged_reference_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reference.safetensors").write_bytes(b"{}")
    with pytest.raises(FileFormatError, match="reference"):
        read_reference(tmp_path / "reference.safetensors")


def test_predictions_equal_those_of_pytorch(exported: Path) -> None:
    cases = {case.name: case for case in read_reference(exported / "reference.safetensors")}
    expected = cases["right padding"].logits
    found = Predictor(open_bundle(exported)).predict(SENTENCES)
    np.testing.assert_allclose(np.array([answer.logits for answer in found]), expected, **FP32_ONNX)
    assert [answer.label for answer in found] == [LABELS[best] for best in expected.argmax(axis=1)]
    odds = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose([answer.score for answer in found], odds.max(axis=1), **FP32_ONNX)


def test_batches_and_order_change_nothing(exported: Path) -> None:
    predictor = Predictor(open_bundle(exported))
    whole = predictor.predict(SENTENCES)
    for batch_size in (1, 4):
        parts = predictor.predict(SENTENCES[::-1], batch_size=batch_size)[::-1]
        np.testing.assert_allclose([a.logits for a in parts], [a.logits for a in whole], **FP32_ONNX)


def test_odd_texts_are_answered(exported: Path) -> None:
    predictor = Predictor(open_bundle(exported))
    answers = predictor.predict(["", "word " * 500, "\u0000\U0001f600"], batch_size=2)
    assert len(answers) == 3 and all(np.isfinite(answer.score) for answer in answers)
    assert predictor.predict([]) == []


@pytest.mark.makes
def test_pairs_are_encoded_like_the_training_tokenizer(exported: Path) -> None:
    from transformers import AutoTokenizer

    first, second = list(SENTENCES[:3]), list(SENTENCES[3:])
    theirs = AutoTokenizer.from_pretrained(exported)(first, second, padding=True, return_tensors="np")
    predictor = Predictor(open_bundle(exported))
    ours = predictor.encoder.tokenizer.encode_batch(list(zip(first, second, strict=True)))
    np.testing.assert_array_equal([row.ids for row in ours], theirs["input_ids"])
    np.testing.assert_array_equal([row.type_ids for row in ours], theirs["token_type_ids"])
    np.testing.assert_array_equal([row.attention_mask for row in ours], theirs["attention_mask"])
    assert len(predictor.predict(first, second)) == 3


def test_bad_arguments_are_refused(exported: Path) -> None:
    predictor = Predictor(open_bundle(exported))
    with pytest.raises(InputError, match="2 texts but 1"):
        predictor.predict(["a", "b"], ["c"])
    with pytest.raises(InputError, match="batch size"):
        predictor.predict(["a"], batch_size=0)
