"""Decoders for other runtimes: what they hold, and that answers are transformers' own whichever side is padded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import qrlora_deploy as qr
from exporters.genai.building import open_base, write_graph
from exporters.genai.exporter import EXPORTER
from exporters.genai.options import GenaiOptions
from qrlora_deploy.errors import CheckFailed, FileFormatError, InputError
from qrlora_deploy.exporting.job import ExportJob, Original
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.runtime.bundle.row_layout import TableLayout
from tests.decoders import force, make_basis, make_customers, save_tiny
from tests.tolerances import DECODER_FP32

Base = tuple[Checkpoint, Basis]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny decoder and its basis."""
    checkpoint = save_tiny(tmp_path_factory.mktemp("base"), "Qwen2")
    return checkpoint, make_basis(checkpoint)


@pytest.fixture(scope="module", params=["rows", "drop-in"])
def exported(request: pytest.FixtureRequest, base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Both variants."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    EXPORTER.export(ExportJob(*base, folder), GenaiOptions(variant=request.param))
    return request.param, folder


def customer_of(base: Base) -> Coefficients:
    checkpoint, basis = base
    values = make_customers(basis)[1]
    return Coefficients(values, basis.digest, checkpoint.name, checkpoint.digest, "text-generation", ())


def session_of(folder: Path) -> Any:
    return onnxruntime.InferenceSession(str(folder / "onnx/model.onnx"), providers=["CPUExecutionProvider"])


def tables(basis: Basis) -> np.ndarray:
    layout = TableLayout(list(basis.ranks.values()))
    return np.stack([layout.row(values) for values in make_customers(basis)])


def padded(prompts: list[np.ndarray], left: bool) -> dict[str, np.ndarray]:
    longest = max(map(len, prompts))
    gaps = [(longest - len(prompt), 0) if left else (0, longest - len(prompt)) for prompt in prompts]
    ids = [np.pad(prompt, gap, constant_values=1) for prompt, gap in zip(prompts, gaps, strict=True)]
    mask = [np.pad(np.ones_like(prompt), gap) for prompt, gap in zip(prompts, gaps, strict=True)]
    return {"input_ids": np.stack(ids), "attention_mask": np.stack(mask)}


def run(session: Any, feeds: dict[str, np.ndarray], following: np.ndarray) -> np.ndarray:
    """`[rows, steps + 1, vocabulary]` as a client with a cache that grows gets them."""
    rows = len(following)
    past = {
        value.name: np.zeros([rows, value.shape[1], 0, value.shape[3]], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    names = ["logits", *(name.replace("past_key_values", "present") for name in past)]
    found = []
    for step in range(following.shape[1] + 1):
        logits, *present = session.run(names, feeds | past)
        found.append(logits[:, -1])
        past = dict(zip(past, present, strict=True))
        if step < following.shape[1]:
            mask = np.concatenate([feeds["attention_mask"], np.ones([rows, 1], np.int64)], axis=1)
            feeds = feeds | {"input_ids": following[:, step : step + 1], "attention_mask": mask}
    return np.stack(found, axis=1)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_rows_and_adapters_answer_as_transformers_does(base: Base, exported: tuple[str, Path], left: bool) -> None:
    variant, folder = exported
    checkpoint, basis = base
    forced, table = force(checkpoint, basis, make_customers(basis)), tables(basis)
    session, feeds = session_of(folder), padded(forced.prompts, left)
    if variant == "rows":
        found = run(session, feeds | {"coefficient_table": table, "slot": np.arange(3)}, forced.following)
    else:
        # The base, then a customer at a time for all rows.
        given = [{}, *({"coefficient_table": table[slot : slot + 1]} for slot in (1, 2))]
        runs = [run(session, feeds | one, forced.following) for one in given]
        found = np.stack([one[row] for row, one in enumerate(runs)])
    np.testing.assert_allclose(found, forced.logits, **DECODER_FP32)
    assert np.abs(forced.logits[1:] - forced.logits[:1]).max() > forced.logits.std()


def test_padding_between_tokens_is_left_out(base: Base, tmp_path: Path) -> None:
    checkpoint, basis = base
    EXPORTER.export(ExportJob(checkpoint, basis, tmp_path / "model", customer_of(base)), GenaiOptions())
    session = session_of(tmp_path / "model")
    ids, following = np.array([[5, 6, 7, 8]]), np.zeros([1, 0], np.int64)
    expected = run(session, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, following)
    holed = {"input_ids": np.array([[1, 5, 1, 6, 7, 1, 8]]), "attention_mask": np.array([[0, 1, 0, 1, 1, 0, 1]])}
    np.testing.assert_allclose(run(session, holed, following), expected, **DECODER_FP32)


def test_a_folder_has_what_clients_read(base: Base, exported: tuple[str, Path]) -> None:
    variant, folder = exported
    checkpoint, _ = base
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    model = config["model"]
    assert (model["type"], model["decoder"]["filename"]) == ("qwen2", "onnx/model.onnx")
    assert (model["eos_token_id"], model["vocab_size"]) == (3, checkpoint.config.vocab_size)
    assert (model["decoder"]["num_key_value_heads"], model["decoder"]["head_size"]) == (2, 16)
    assert model["context_length"] == config["search"]["max_length"] == 128
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "README.md"):
        assert (folder / name).is_file()
    graph = onnx.load(folder / "onnx/model.onnx", load_external_data=False).graph
    assert {entry.value for one in graph.initializer for entry in one.external_data if entry.key == "location"} == {
        "model.onnx_data"
    }
    # transformers.js makes a first cache from the names of axes.
    cache = next(value for value in graph.input if value.name == "past_key_values.0.key")
    assert cache.type.tensor_type.shape.dim[0].dim_param == "batch_size"
    assert ("slot" in {value.name for value in graph.input}) == (variant == "rows")


def test_verify_repeats_the_check_and_sees_changes(exported: tuple[str, Path], tmp_path: Path, base: Base) -> None:
    _, folder = exported
    verdict = EXPORTER.verify(folder, None, "cpu")
    assert verdict.failure is None
    assert verdict.facts["cases"] == 2
    with pytest.raises(InputError, match="leave out coefficients"):
        EXPORTER.verify(folder, Original(*base, customer_of(base)), "cpu")
    with pytest.raises(InputError, match=r"holds no export\.json"):
        EXPORTER.verify(tmp_path, None, "cpu")
    config = folder / "genai_config.json"
    before = config.read_bytes()
    config.write_bytes(before + b" ")
    with pytest.raises(FileFormatError, match=r"genai_config\.json"):
        EXPORTER.verify(folder, None, "cpu")
    config.write_bytes(before)


@pytest.mark.parametrize("variant", ["rows", "drop-in"])
def test_graphs_in_fp16_are_whole_without_a_gpu(base: Base, tmp_path: Path, variant: str) -> None:
    options = GenaiOptions(variant=variant, precision="fp16", provider="cuda")
    graph = tmp_path / "model.onnx"
    write_graph(ExportJob(*base, tmp_path), open_base(base[0], options), options, variant, graph)
    onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["rows", "drop-in"])
def test_in_fp16_on_a_gpu_answers_are_within_the_precisions_bound(base: Base, tmp_path: Path, variant: str) -> None:
    """By ONNX Runtime itself, padded on either side, with other customers in the rows."""
    options = GenaiOptions(variant=variant, precision="fp16", provider="cuda")
    record = EXPORTER.export(ExportJob(*base, tmp_path / "model"), options)
    assert record["parity"]["cases"] == 2 and record["parity"]["max_abs_error"] <= record["parity"]["bound"]
    assert record["customer_effect"] > 10 * record["parity"]["max_abs_error"]
    config = json.loads((tmp_path / "model/genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    assert EXPORTER.verify(tmp_path / "model", None, "cuda").failure is None


def test_an_adapter_of_a_decoder_is_the_only_row_of_the_table(base: Base, tmp_path: Path) -> None:
    qr.export(*base, tmp_path / "acme.onnx_adapter", format="onnx-adapter", coefficients=customer_of(base))
    adapter = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "acme.onnx_adapter"))
    values = {name: value.numpy() for name, value in adapter.get_parameters().items()}
    assert list(values) == ["coefficient_table"]
    assert np.array_equal(values["coefficient_table"], tables(base[1])[1:2])
    with pytest.raises(InputError, match="head_labels is not for decoders"):
        qr.export(*base, tmp_path / "b", format="onnx-adapter", coefficients=customer_of(base), head_labels=3)


def test_nothing_is_left_where_the_answers_differ(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.genai import cases

    real = cases.make_case

    def wrong(*arguments: Any, **named: Any) -> Any:
        case = real(*arguments, **named)
        case.logits[0, 3] += 1.0
        return case

    monkeypatch.setattr(cases, "make_case", wrong)
    with pytest.raises(CheckFailed, match="logits differ"):
        EXPORTER.export(ExportJob(*base, tmp_path / "model"), GenaiOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"precision": "fp16"}, "fp16 is not for"),
        ({"provider": "cuda"}, "fp32 is not for"),
        ({"variant": "drop-in", "table_dtype": "fp16"}, "adapters hold fp32"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        GenaiOptions(**options)


def test_a_variant_beside_a_customer_and_an_encoder_are_refused(base: Base, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="variant is for all customers"):
        EXPORTER.export(ExportJob(*base, tmp_path / "a", customer_of(base)), GenaiOptions(variant="rows"))
    basis = qr.factorize(tiny_base, rank=2)
    with pytest.raises(InputError, match="is for decoders"):
        qr.export(tiny_base, basis, tmp_path / "b", format="genai")
