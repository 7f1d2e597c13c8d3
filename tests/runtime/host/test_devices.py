"""Which device a session is opened on, with which options, and that opening it changes nothing of the process."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from qrlora_deploy.errors import FileFormatError, ProviderError
from qrlora_deploy.runtime import Device, SwitchableSession, open_bundle, open_session
from qrlora_deploy.runtime.bundle.row_layout import TABLE
from qrlora_deploy.runtime.sessions import session as session_module
from qrlora_deploy.runtime.sessions.bucket_runner import _CudaBuffers
from qrlora_deploy.runtime.table.memory import CudaMemory, HostMemory, make_memory
from tests.runtime.fake_cuda import FakeCuda
from tests.tolerances import FP32_ONNX


class Opened:
    """Takes the place of ONNX Runtime's session: what it was asked for, and what stdout was meanwhile."""

    def __init__(self, path: str, options: Any, providers: list[Any], enable_fallback: int) -> None:
        self.path, self.options, self.providers, self.enable_fallback = path, options, providers, enable_fallback
        self.stdout = sys.stdout

    def get_providers(self) -> list[str]:
        return [item if isinstance(item, str) else item[0] for item in self.providers]

    def get_inputs(self) -> list[Any]:
        return []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda().install(monkeypatch)
    monkeypatch.setattr(session_module, "device_count", lambda: fake.devices)
    monkeypatch.setattr(session_module, "_missing", lambda provider: "")
    monkeypatch.setattr(session_module, "_library", lambda part: Path(__file__))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(session_module.PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Opened)
    yield fake
    gc.collect()


@pytest.mark.parametrize(
    ("name", "device"),
    [("cpu", Device()), ("cuda", Device("cuda")), ("cuda:3", Device("cuda", 3)), ("tensorrt:1", Device("tensorrt", 1))],
)
def test_a_device_has_a_name(name: str, device: Device) -> None:
    assert Device.of(name) == device and Device.of(device) is device


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cuda:٣", "cuda:9999", "cpu:1", ""])
def test_a_name_of_no_device_is_refused(name: str) -> None:
    with pytest.raises(ProviderError):
        Device.of(name)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_session_is_opened_on_its_gpu(fake: FakeCuda, provider: str) -> None:
    fake.devices = 3
    own = Device(provider, 2, {"gpu_mem_limit": 5}, lambda options: setattr(options, "enable_profiling", True))
    opened = open_session(Path("model"), own, threads=3)
    chain = {item[0]: item[1] for item in opened.providers if not isinstance(item, str)}
    assert all(options["device_id"] == "2" for options in chain.values())
    assert chain["CUDAExecutionProvider"]["gpu_mem_limit"] == 5 and chain["CUDAExecutionProvider"]["use_tf32"] == "0"
    assert opened.options.intra_op_num_threads == 3 and opened.options.enable_profiling
    assert opened.enable_fallback == 0, "or it goes on with the CPU"


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [(0, "cuda", "no usable NVIDIA GPU"), (2, "cuda:2", "there is no GPU 2, but 2 of them, counted from 0")],
)
def test_a_gpu_that_is_not_there_is_refused_before_onnx_runtime_is_asked(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, count: int, name: str, message: str
) -> None:
    fake.devices = count
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(ProviderError, match=message):
        open_session(Path("model"), name)


def test_the_table_and_the_buckets_lie_on_the_same_gpu(fake: FakeCuda) -> None:
    fake.devices = 2
    memory = make_memory({TABLE: 8}, 4, "cuda:1")
    memory.write(2, {TABLE: np.ones(8, np.float32)})
    larger = memory.grown(8)
    assert larger.holds(2, {TABLE: np.ones(8, np.float32)}) and not larger.holds(1, {TABLE: np.ones(8, np.float32)})
    assert isinstance(larger.parts[TABLE], CudaMemory) and larger.parts[TABLE].device == 1
    larger.parts[TABLE].staging(2)
    _CudaBuffers(1024, 512, 1).upload()
    assert fake.used == {1}
    assert isinstance(make_memory({TABLE: 8}, 4, "cpu").parts[TABLE], HostMemory)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_opening_a_session_changes_nothing_of_the_process(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], provider: str
) -> None:
    seen = []

    def preload(cuda: bool = True) -> None:
        seen.append(sys.stdout)
        print("Failed to load")

    def never(level: int) -> None:
        raise AssertionError("the level of others' sessions")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", never)
    before = sys.stdout
    opened = open_session(Path("model"), provider)
    assert opened.stdout is before and all(stream is before for stream in seen)
    assert len(seen) == (provider == "cuda") and capsys.readouterr().out == ""
    print("still there")
    assert capsys.readouterr().out == "still there\n"


def test_a_real_session_takes_options_of_its_own(switchable: Path, tmp_path: Path) -> None:
    bundle = open_bundle(switchable)
    taken = []
    device = Device(provider_options={"use_arena": "0"}, configure=taken.append)
    session = SwitchableSession(bundle, device, threads=1)
    assert [options.intra_op_num_threads for options in taken] == [1]
    # ONNX Runtime would keep memory for each shape that it ever ran, and a server meets very many.
    assert not taken[0].enable_mem_pattern
    plain = SwitchableSession(bundle, threads=1)
    inputs = {name: np.ones((1, 3), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    np.testing.assert_array_equal(session.predict(inputs, [None])[0], plain.predict(inputs, [None])[0])
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="cannot be opened"):
        open_session(tmp_path / "model.onnx", device)


@pytest.mark.parametrize("kind", ["INT4", "INT8"])
def test_no_session_rounds_activations_unless_its_graph_says_so(tmp_path: Path, kind: str) -> None:
    """ONNX Runtime, left alone, rounds to 8 bits what is multiplied by a weight that is dequantised in blocks."""
    onnx = pytest.importorskip("onnx", reason="writes a graph by the onnx package")
    random = np.random.default_rng(0)
    levels, scales = random.integers(-8, 8, (64, 32)), random.random((2, 32), dtype=np.float32)
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["w", "scales"], ["weight"], axis=0, block_size=32),
        onnx.helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4, s]) for n, s in (("x", 64), ("y", 32)))
    weight = onnx.helper.make_tensor("w", getattr(onnx.TensorProto, kind), [64, 32], levels.ravel())
    weights = [weight, onnx.numpy_helper.from_array(scales, "scales")]
    graph = onnx.helper.make_graph(nodes, "graph", [x], [y], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    inputs = {"x": random.normal(size=(4, 64)).astype(np.float32)}
    expected = inputs["x"] @ (levels * scales.repeat(32, 0)).astype(np.float32)
    found = open_session(tmp_path / "model.onnx", threads=1).run(None, inputs)[0]
    np.testing.assert_allclose(found, expected, **FP32_ONNX)
    alone = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert np.abs(alone.run(None, inputs)[0] - expected).max() > 10 * np.abs(found - expected).max()
