"""A bundle that is not what was exported is never opened."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.runtime import open_bundle
from qrlora_deploy.runtime.bundle.external_data import external_locations
from tests.forging import reseal

onnx = pytest.importorskip("onnx", reason="forges graphs by the onnx package")

Copy = Callable[[], Path]


def point_weights_to(folder: Path, location: str) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_untouched_bundle_opens(exported: Path) -> None:
    assert open_bundle(exported).manifest.kind == "merged"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "reference.safetensors", "tokenizer.json"])
def test_changed_byte_is_refused(copied: Copy, name: str) -> None:
    folder = copied()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=f"{name} was changed"):
        open_bundle(folder)


def test_all_problems_are_named_at_once(copied: Copy) -> None:
    folder = copied()
    (folder / "model.onnx.data").unlink()
    (folder / "config.json").write_text("{}")
    with pytest.raises(FileFormatError) as caught:
        open_bundle(folder)
    assert "model.onnx.data is missing" in str(caught.value) and "config.json was changed" in str(caught.value)


def test_a_manifest_that_is_a_link_says_how_to_get_files(copied: Copy, tmp_path: Path) -> None:
    folder = copied()
    (folder / "manifest.json").rename(tmp_path / "blob")
    (folder / "manifest.json").symlink_to(tmp_path / "blob")
    with pytest.raises(FileFormatError, match=r"manifest\.json is a link, .*snapshot_download\(local_dir=\.\.\.\)"):
        open_bundle(folder)


def test_link_is_refused_even_with_the_right_content(copied: Copy, tmp_path: Path) -> None:
    folder = copied()
    weights = folder / "model.onnx.data"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileFormatError, match="is a link"):
        open_bundle(folder)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "unsealed.bin", ""])
def test_weights_outside_the_bundle_are_refused(copied: Copy, location: str) -> None:
    folder = copied()
    point_weights_to(folder, location)
    reseal(folder)
    with pytest.raises(FileFormatError, match="weights outside the bundle"):
        open_bundle(folder)


def test_weights_hidden_in_a_subgraph_are_found() -> None:
    tensor = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../deep")
    inner = onnx.GraphProto(initializer=[tensor])
    node = onnx.NodeProto(attribute=[onnx.AttributeProto(name="then_branch", g=inner)])
    function = onnx.FunctionProto(
        node=[onnx.NodeProto(attribute=[onnx.AttributeProto(name="value", t=tensor)])], name="f"
    )
    for model in (onnx.ModelProto(graph=onnx.GraphProto(node=[node])), onnx.ModelProto(functions=[function])):
        assert external_locations(model.SerializeToString()) == {"../deep"}


@pytest.mark.parametrize("content", [b"\xff" * 20, b"\x3a\x7f\x01", b"\x0b"])
def test_bytes_that_are_no_model_are_refused(content: bytes) -> None:
    with pytest.raises(FileFormatError):
        external_locations(content)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "C:\\x", ".."])
def test_manifest_that_names_files_elsewhere_is_refused(copied: Copy, name: str) -> None:
    folder = copied()
    files = json.loads((folder / "manifest.json").read_text())["files"]
    reseal(folder, files=files | {name: "0" * 64})
    with pytest.raises(FileFormatError, match="lies outside the bundle"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2; this version reads 1"),
        ({"surprise": 1}, "surprise"),
        ({"basis_digest": "short"}, "basis_digest"),
        ({"files": {}}, "does not list model.onnx"),
        ({"customer_effect": float("nan")}, "customer_effect"),
        ({"calibration": {"method": "minmax", "rows": 8, "texts_digest": "0" * 64}}, "belongs to int8; fp32 has no"),
        ({"calibration": {}}, "calibration.method"),
        ({"accuracy_level": 4}, "accuracy_level belongs to int8 and int4; fp32 has no"),
        ({"precision": "int8", "accuracy_level": 2}, "accuracy_level"),
        ({"calibration": True}, "calibration"),
    ],
)
def test_wrong_manifest_is_refused(copied: Copy, changes: dict[str, object], message: str) -> None:
    folder = copied()
    reseal(folder, **changes)
    with pytest.raises(FileFormatError, match=message):
        open_bundle(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_manifest_that_is_no_record_is_refused(copied: Copy, text: str) -> None:
    folder = copied()
    (folder / "manifest.json").write_text(text)
    with pytest.raises(FileFormatError):
        open_bundle(folder)


def test_folder_without_manifest_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a bundle"):
        open_bundle(tmp_path)


def test_manifest_that_may_not_be_read_is_bad_input(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(InputError, match=r"manifest\.json cannot be read: Permission denied"):
        open_bundle(exported)


def test_manifest_of_an_earlier_version_opens(copied: Copy) -> None:
    """It does not say whether an int8 graph was calibrated, or rounds activations in blocks."""
    folder = copied()
    record = json.loads((folder / "manifest.json").read_text())
    assert record.pop("calibration") is None and record.pop("accuracy_level") is None
    (folder / "manifest.json").write_text(json.dumps(record))
    assert open_bundle(folder).manifest.calibration is None


def test_manifest_json_is_stable(exported: Path) -> None:
    assert open_bundle(exported).manifest.to_json() == (exported / "manifest.json").read_text()
