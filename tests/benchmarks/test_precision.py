"""The benchmark of precisions: what it counts is true, and a form that is refused is said to be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import precision
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.errors import CheckFailed, InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime import Predictor, open_bundle
from tests.tiny import LABELS, SENTENCES

ROWS = [(sentence, LABELS[row % 4]) for row, sentence in enumerate(SENTENCES)]


@pytest.fixture
def folder(tiny_base: Path, tiny_basis_file: Path, tiny_customer: Coefficients, tmp_path: Path) -> Path:
    """As quickstart leaves it, with two customers, and labelled rows of one of them in `data`."""
    made = tmp_path / "made"
    shutil.copytree(tiny_base, made / "base")
    shutil.copy(tiny_basis_file, made / "basis.safetensors")
    write_coefficients(tiny_customer, made / "acme.safetensors")
    write_coefficients(replace(tiny_customer, values=-tiny_customer.values), made / "bolt.safetensors")
    (made / "data").mkdir()
    for name in ("acme", "bolt", "stranger"):
        text = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)
        (made / "data" / f"{name}.tsv").write_text(text)
    return made


def options(folder: Path, *others: str) -> list[str]:
    data = folder / "data"
    return [str(folder), "--data", str(data), "--calibration", str(data / "acme.tsv"), *others]


def test_record_of_bundles(
    folder: Path, exported: Path, switchable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms are fp32, so nothing is lost; the merged bundle of the other one is not there, and refused."""
    kept = tmp_path / "bundles"
    shutil.copytree(exported, kept / "merged fp32")
    for form in ("fp32", "other"):
        shutil.copytree(switchable, kept / f"switchable {form}")

    def refuse(_job: ExportJob, _options: OnnxOptions) -> None:
        raise CheckFailed("labels are not PyTorch's")

    monkeypatch.setattr(precision, "export_merged", refuse)
    monkeypatch.setattr(precision, "FORMS", {"fp32": ("fp32", False), "other": ("fp32", False)})
    monkeypatch.setattr(precision, "SHAPES", ((2, 8),))
    monkeypatch.setattr(precision, "rest", lambda: None)
    output = tmp_path / "record.json"
    precision.main(options(folder, "--bundles", str(kept), "--runs", "30", "-o", str(output)))
    record = json.loads(output.read_text())
    assert record["customers"] == ["acme", "bolt"] and record["merged_customer"] == "acme"
    bundles, times = record["bundles"], record["latency"]["2x8"]
    assert bundles["merged other"] == {"refused": "labels are not PyTorch's"}
    assert set(times) == {"merged fp32", "switchable fp32", "switchable other"}
    assert [set(bundles[name]["accuracy"]) for name in times] == [{"acme"}, {"acme", "bolt"}, {"acme", "bolt"}]
    answers = [answer.label for answer in Predictor(open_bundle(exported)).predict(SENTENCES)]
    expected = np.mean([answer == label for answer, (_text, label) in zip(answers, ROWS, strict=True)])
    same = {"rows": len(ROWS), "accuracy": expected, "same_label": 1.0, "lost": 0, "gained": 0}
    assert bundles["merged fp32"]["accuracy"]["acme"] == bundles["switchable other"]["accuracy"]["acme"] == same
    assert bundles["merged fp32"]["graph_bytes"] == sum(path.stat().st_size for path in exported.glob("model.onnx*"))
    assert bundles["merged fp32"]["calibration"] is None and bundles["merged fp32"]["parity"]["label_agreement"] == 1.0
    assert all(each["samples"] == 30 for each in times.values())
    ratio = times["switchable other"]["ratio_to_fp32"]
    assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"] and "ratio_to_fp32" not in times["switchable fp32"]
    assert str(folder) not in json.dumps(record)


def test_score_counts_what_was_lost_and_gained() -> None:
    labels, reference = np.array(list("aabbc")), np.array(list("aabcd"))
    found = precision.score(np.array(list("abbbe")), labels, reference)
    assert found == {"rows": 5, "accuracy": 0.6, "same_label": 0.4, "lost": 1, "gained": 1}
    assert precision.score(reference, labels, None) == {"rows": 5, "accuracy": 0.6}


def test_customers_without_rows_are_an_error(folder: Path) -> None:
    parse = precision.make_parser().parse_args
    with pytest.raises(InputError, match="no customer with labelled rows; choose from acme, bolt"):
        precision.read_material(parse(options(folder, "--merged", "stranger")))
    for name in ("acme", "bolt"):
        (folder / "data" / f"{name}.tsv").unlink()
    with pytest.raises(InputError, match="holds no customer with labelled rows; there are rows of stranger"):
        precision.read_material(parse(options(folder)))


def test_bundles_of_something_else_are_not_measured(folder: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "bundles" / "merged fp16")
    given = options(folder, "--form", "fp16", "--merged", "bolt", "--bundles", str(tmp_path / "bundles"))
    arguments = precision.make_parser().parse_args(given)
    material = precision.read_material(arguments)
    with pytest.raises(InputError, match="another coefficients_digest, precision than is asked for"):
        precision.open_subject(material, "merged fp16", tmp_path / "bundles" / "merged fp16")


@pytest.mark.slow
def test_exports_are_made_as_their_forms_say(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SHAPES", ((1, 8),))
    precision.main(options(folder, "--runs", "2", "-o", str(tmp_path / "record.json")))
    bundles = json.loads((tmp_path / "record.json").read_text())["bundles"]
    assert list(bundles) == sorted(f"{kind} {form}" for kind in precision.KINDS for form in precision.FORMS)
    for name, bundle in bundles.items():
        assert "refused" not in bundle, name
        assert (bundle["calibration"] is not None) == name.endswith("calibrated")
        assert bundle["graph_bytes"] < bundles[precision.reference_of(name)]["graph_bytes"] or name.endswith("fp32")
