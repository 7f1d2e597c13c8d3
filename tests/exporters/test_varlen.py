"""Packed attention: the second graph of a padding-free bundle."""

import copy
import ctypes
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from exporters.onnx import export_merged, export_switchable
from exporters.onnx.graph import SMALLEST_EXTERNAL_BYTES, input_names, write_graph
from exporters.onnx.options import OnnxOptions
from exporters.onnx.varlen import OPERATOR, VarlenPacking
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError, ProviderError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime import Buckets, SwitchableSession, open_bundle, open_session, verify
from qrlora_deploy.runtime.bundle.bundle import TensorRecord
from qrlora_deploy.runtime.bundle.external_data import external_locations
from qrlora_deploy.runtime.bundle.packed_inputs import BORDERS, FIRSTS, OFFSETS, PACKED_INPUTS, PLACES, ROWS, SEATS
from qrlora_deploy.runtime.prediction.predictor import Predictor
from qrlora_deploy.runtime.sessions.bucket_runner import BucketRunner
from qrlora_deploy.runtime.sessions.packed_tokens import packed_arrays, packed_size
from qrlora_deploy.runtime.sessions.runners import PaddingRunner, WorkerRunner
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, is_right_padded, kept_tokens
from qrlora_deploy.runtime.sessions.worker import Worker
from tests.exporters.test_switchable import save_encoder
from tests.runtime.fire import made_up_customer, made_up_inputs
from tests.tolerances import FP16_DEVICES, FP32_ONNX

CUDA: dict[str, Any] = {"padding_free": True, "provider": "cuda", "precision": "fp16"}

LENGTHS = ([6, 6], [1, 6], [3, 1], [6], [1], [2, 5, 6, 1])


class PackedAttention(OpRun):
    """The operator in numpy, row by row, from where each row begins."""

    op_domain = "com.microsoft"

    def _run(self, *arrays: Any, num_heads: int = 1, scale: float | None = None) -> tuple[np.ndarray]:
        query, key, value, bias, offsets, borders, added = (*arrays, None)[:7]
        assert sorted(offsets.flatten()) == list(range(offsets.size))
        if query.ndim == 4:
            # All three, head by head.
            assert key is None and value is None and query.shape[1:3] == (num_heads, 3)
            query, key, value = (query[:, :, part].reshape(len(query), -1) for part in range(3))
        if bias is not None:
            query, key, value = (it + own for it, own in zip((query, key, value), np.split(bias, 3), strict=True))
        size = query.shape[1] // num_heads
        # Behind the last row the kernel writes nothing.
        output = np.full_like(query, np.nan)
        for row, (start, end) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
            if start == end:
                continue
            places = offsets.flatten()[start:end]
            assert places.tolist() == list(range(row * offsets.shape[1], row * offsets.shape[1] + end - start))
            cut = [it[start:end].reshape(-1, num_heads, size).swapaxes(0, 1) for it in (query, key, value)]
            scores = cut[0] @ cut[1].swapaxes(1, 2) * (size**-0.5 if scale is None else scale)
            if added is not None:
                scores = scores + added[0, :, : end - start, : end - start]
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            output[start:end] = (weights @ cut[2]).swapaxes(0, 1).reshape(end - start, -1)
        return (output,)


PackedAttention.__name__ = OPERATOR


@pytest.mark.parametrize("name", ["distilbert", "mpnet", pytest.param("roberta", marks=pytest.mark.slow)])
def test_both_graphs_answer_alike_from_the_same_weights(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_encoder(name, tmp_path / "base")))
    model, packing = checkpoint.load_model(), VarlenPacking(required=True)
    names = input_names(model, checkpoint.tokenizer())
    try:
        graph = write_graph(model, names, tmp_path, packing=packing)
    except InputError as error:
        pytest.skip(f"an attention of its own: {error}")
    assert graph.packed
    packed = onnx.load(tmp_path / "packed.onnx", load_external_data=False)
    assert [node.op_type for node in packed.graph.node].count(OPERATOR) == graph.attention_nodes == 2
    assert not any(node.op_type == "Attention" for node in packed.graph.node)
    assert external_locations((tmp_path / "packed.onnx").read_bytes()) == {"model.onnx.data"}
    assert max(len(tensor.raw_data) for tensor in packed.graph.initializer) < SMALLEST_EXTERNAL_BYTES
    evaluator = ReferenceEvaluator(str(tmp_path / "packed.onnx"), new_ops=[PackedAttention])
    session = open_session(tmp_path / "model.onnx", threads=1)
    for lengths in LENGTHS:
        mask = (np.arange(6) < np.array(lengths)[:, None]).astype(np.int64)
        inputs = {name: np.zeros_like(mask) for name in names}
        inputs |= {"input_ids": np.random.default_rng(3).integers(5, 100, mask.shape), "attention_mask": mask}
        expected = session.run(None, inputs | {TOKEN_INDEX: kept_tokens(mask)})[0]
        batch, taken = len(mask), [value.name for value in packed.graph.input]
        count = int(mask.sum())
        for rows, length, tokens in ((batch, 6, count), (batch, 8, count + 3), (batch + 3, 8, count + 3)):
            feeds = packed_arrays(inputs, taken, rows, length, tokens)
            found = evaluator.run(None, feeds)[0]
            np.testing.assert_allclose(found[:batch], expected, **FP32_ONNX)


def test_a_model_that_looks_a_few_tokens_far_has_no_packed_attention(tmp_path: Path) -> None:
    packing = VarlenPacking()
    packing.obstacle = "a token looks 3 tokens far"
    assert not packing.possible(object())
    packing.required = True
    with pytest.raises(InputError, match="object cannot have attention='packed': a token looks 3 tokens far"):
        packing.possible(object())


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_free": True}, {"provider": "cuda", "precision": "fp16"}, {"provider": "cuda", "precision": "bf16"}],
)
def test_packed_attention_without_what_it_needs_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"attention='packed' needs padding_free, provider='cuda' and precision="):
        OnnxOptions(attention="packed", **options)
    assert not OnnxOptions(**options).packs
    assert OnnxOptions(padding_free=True, provider="cuda", precision="fp16").packs
    assert not OnnxOptions(padding_free=True, provider="cuda", precision="fp16", attention="standard").packs
    assert OnnxOptions(**CUDA, small_batches=True).packs
    for further in ({"attention": "standard"}, {"merged_cache": True}, {"padding_free": False}):
        with pytest.raises(InputError, match="small_batches is for packed attention"):
            OnnxOptions(
                **{"padding_free": True, "provider": "cuda", "precision": "fp16", "small_batches": True} | further
            )
    with pytest.raises(InputError, match="unknown attention 'flash'; choose from auto, standard, packed"):
        OnnxOptions(attention="flash")


class FakeSession:
    """A graph in numpy, run where arrays are bound by their addresses, as a captured one is."""

    def __init__(self, path: Path) -> None:
        self.graph = onnx.load(path, load_external_data=False).graph
        self.evaluator = ReferenceEvaluator(str(path), new_ops=[PackedAttention])
        self.bound: dict[str, np.ndarray] = {}

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]

    def get_inputs(self) -> list[Any]:
        return list(self.graph.input)

    def get_outputs(self) -> list[Any]:
        return list(self.graph.output)

    def io_binding(self) -> "FakeSession":
        other = copy.copy(self)
        other.bound = {}
        return other

    def bind_input(self, name: str, _device: str, _id: int, dtype: Any, shape: tuple[int, ...], pointer: int) -> None:
        size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.bound[name] = np.frombuffer((ctypes.c_char * size_bytes).from_address(pointer), dtype).reshape(shape)

    bind_output = bind_input

    def run_with_iobinding(self, binding: "FakeSession", _options: Any) -> None:
        inputs = {name: array for name, array in binding.bound.items() if name != "logits"}
        binding.bound["logits"][:] = self.evaluator.run(None, inputs)[0]


def test_a_captured_graph_fits_any_mixture_of_lengths(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_encoder("mpnet", tmp_path / "base")))
    model = checkpoint.load_model()
    names = input_names(model, checkpoint.tokenizer())
    graph = write_graph(model, names, tmp_path, packing=VarlenPacking())
    record = TensorRecord(name="logits", dtype="float32", shape=("batch", 4))
    manifest: Any = SimpleNamespace(inputs=graph.inputs, outputs=(record,), pad_token_id=0, pad_token_type_id=0)
    session, plain = FakeSession(tmp_path / "packed.onnx"), open_session(tmp_path / "model.onnx", threads=1)
    runner = BucketRunner(session, manifest, None, Buckets((8,), (16, 40)))
    random = np.random.default_rng(7)
    for lengths in ([40, 1, 3], [16], [1], [9, 9, 9, 9, 9, 9, 9, 9], [40] * 8, [20, 30, 14], [2] * 7):
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        inputs = {name: np.zeros_like(mask) for name in names}
        inputs |= {"input_ids": random.integers(5, 100, mask.shape), "attention_mask": mask}
        expected = plain.run(None, inputs | {TOKEN_INDEX: kept_tokens(mask)})[0]
        np.testing.assert_allclose(runner.run(inputs), expected, **FP32_ONNX)
    # Two lengths, and numbers of tokens in steps of 64, whatever the rows; full rows when it opened.
    assert sorted(runner._bound) == [(8, 16, 64), (8, 16, 128), (8, 40, 64), (8, 40, 320)]


@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=6), more=st.integers(0, 3), spare=st.integers(0, 9))
def test_packed_arrays_say_where_each_token_is(rows: list[int], more: int, spare: int) -> None:
    mask = (np.arange(9) < np.array(rows)[:, None]).astype(np.int64)
    ids = np.arange(mask.size).reshape(mask.shape)
    count, length, tokens = sum(rows), 16, min(sum(rows) + spare, 16 * (len(rows) + more))
    inputs = {"input_ids": ids, "attention_mask": mask}
    wanted = ("input_ids", *PACKED_INPUTS)
    found = packed_arrays(inputs, wanted, len(rows) + more, length, tokens)
    owners = [row for row, size in enumerate(rows) for _ in range(size)]
    places = [place for size in rows for place in range(size)]
    assert found[ROWS].tolist() == owners + [0] * (tokens - count)
    assert found[PLACES].tolist() == places + [0] * (tokens - count)
    assert found["input_ids"][:count].tolist() == ids[mask == 1].tolist()
    begins = [sum(rows[:row]) for row in range(len(rows))]
    assert found[BORDERS].tolist() == begins + [count] * (more + 1)
    assert found[FIRSTS].tolist() == begins + [0] * more
    offsets = found[OFFSETS].flatten()
    assert offsets[:count].tolist() == [length * row + place for row, place in zip(owners, places, strict=True)]
    assert sorted(offsets) == list(range(offsets.size))
    for row, size in enumerate(rows):
        seats = found[SEATS][row].tolist()
        assert seats == [begins[row] + (place if place < size else 0) for place in range(length)]


@given(rows=st.integers(1, 80), length=st.integers(1, 520), share=st.floats(0, 1))
def test_numbers_of_tokens_come_in_small_steps(rows: int, length: int, share: float) -> None:
    tokens = max(1, int(share * rows * length))
    size = packed_size(tokens, rows, length)
    assert tokens <= size <= rows * length and size - tokens < max(64, tokens / 8)


@given(rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_right_padded_rows_are_text_and_then_padding(rows: list[list[bool]]) -> None:
    expected = all(any(row) and row == sorted(row, reverse=True) for row in rows)
    assert is_right_padded(np.array(rows).astype(np.int64)) == expected


class Named:
    """A runner that answers with its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def run(self, inputs: Any, slot: np.ndarray | None = None) -> np.ndarray:
        return np.full((1, 1), self.number)


class Threads(Named):
    """Answers with its number, and keeps which threads asked."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.seen: set[int] = set()

    def run(self, inputs: Any, slot: np.ndarray | None = None) -> np.ndarray:
        self.seen.add(threading.get_ident())
        return super().run(inputs, slot)


def test_what_runs_beside_captured_graphs_runs_in_their_thread() -> None:
    worker, plain = Worker(), Threads(3)
    assert WorkerRunner(plain, worker).run({})[0, 0] == 3
    assert plain.seen == {worker.call(threading.get_ident)} != {threading.get_ident()}


def test_a_batch_runs_in_the_graph_for_its_padding_and_the_other_is_opened_once() -> None:
    opened = []

    def open_other() -> Named:
        opened.append(2)
        return Named(2)

    runner = PaddingRunner(Named(1), open_other, pad=7)
    masks = ([1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1])
    ids = np.array([[5, 6, 7]])
    found = [runner.run({"attention_mask": np.array([mask]), "input_ids": ids})[0, 0] for mask in masks]
    # The last one has a token of padding in its text.
    assert found == [1, 2, 2, 2, 2] and opened == [2]


@pytest.fixture(scope="module", params=[("mpnet", False), ("roberta", False), ("roberta", True)])
def on_cuda(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: Examples) -> Any:
    """A switchable and a merged bundle with packed attention, and the customer of the second."""
    name, small_batches = request.param
    folder = tmp_path_factory.mktemp("packed")
    checkpoint = open_checkpoint(str(save_encoder(name, folder / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    options = OnnxOptions(
        data=texts,
        padding_free=True,
        attention="packed",
        provider="cuda",
        precision="fp16",
        small_batches=small_batches,
    )
    values = np.random.default_rng(5).uniform(0.3, 1.0, basis.total_rank).astype(np.float32)
    customer = Coefficients(
        values, basis.digest, checkpoint.name, checkpoint.digest, checkpoint.task, checkpoint.labels
    )
    try:
        export_switchable(ExportJob(checkpoint, basis, folder / "all"), options)
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    export_merged(ExportJob(checkpoint, basis, folder / "one", customer), options)
    return folder / "all", folder / "one", FP16_DEVICES


@pytest.mark.gpu
def test_every_mask_is_answered_as_on_the_cpu(on_cuda: Any) -> None:
    folder, _one, tolerance = on_cuda
    bundle = open_bundle(folder)
    assert bundle.packed is not None and verify(bundle, "cuda").passed and verify(bundle).passed
    buckets = Buckets((1, 4, 32), (12, 24))
    sessions = [SwitchableSession(bundle, threads=1)]
    sessions += [SwitchableSession(bundle, "cuda", buckets=chosen) for chosen in (None, buckets)]
    for session in sessions:
        for number in range(9):
            session.load(f"c{number}", made_up_customer(session.manifest, number, None))
    names = [None, *sessions[0].customers()]
    random = np.random.default_rng(1)
    for kind in ("right", "left", "holes", "right"):
        for batch, length in ((1, 1), (1, 3), (4, 12), (31, 24), (2, 13), (33, 24), (5, 20), (32, 24), (3, 37)):
            inputs = made_up_inputs(bundle.manifest, batch, length, seed=batch)
            mask = np.arange(length) < random.integers(1, length + 1, batch)[:, None]
            mask[0] = True
            if kind == "left":
                mask = mask[:, ::-1]
            if kind == "holes":
                mask[:, 1::2] = False
            inputs["attention_mask"][:] = mask
            owners = [names[row % len(names)] for row in range(batch)]
            expected, *found = (session.predict(inputs, owners)[0] for session in sessions)
            for answer in found:
                np.testing.assert_allclose(answer, expected, **tolerance)


@pytest.mark.gpu
def test_a_customer_whose_numbers_overflow_spoils_no_other_row(on_cuda: Any) -> None:
    folder, _one, tolerance = on_cuda
    bundle = open_bundle(folder)
    customer = made_up_customer(bundle.manifest, 0)
    largest = 3e38 if bundle.manifest.table_dtype == "fp32" else 6e4
    for session in (SwitchableSession(bundle, "cuda"), SwitchableSession(bundle, "cuda", buckets=Buckets((8,), (24,)))):
        session.load("usual", customer)
        session.load("huge", replace(customer, values=largest * np.sign(customer.values)))
        inputs = made_up_inputs(bundle.manifest, 5, 20)
        inputs["attention_mask"][:] = np.arange(20) < np.array([7, 20, 1, 12, 3])[:, None]
        for mask in (inputs["attention_mask"], inputs["attention_mask"][:, ::-1]):
            inputs["attention_mask"] = np.ascontiguousarray(mask)
            expected = session.predict(inputs, ["usual"] * 5)[0]
            for row in range(5):
                others = np.arange(5) != row
                found = session.predict(inputs, [("usual", "huge")[place == row] for place in range(5)])[0]
                assert not np.allclose(found[row], expected[row], **tolerance)
                np.testing.assert_allclose(found[others], expected[others], **tolerance)


@pytest.mark.gpu
def test_a_merged_bundle_answers_texts_by_its_packed_graph(on_cuda: Any) -> None:
    _all, folder, tolerance = on_cuda
    bundle = open_bundle(folder)
    assert bundle.packed is not None and verify(bundle, "cuda").passed
    texts = ["a", "some words of a text", "another one that is a good deal longer than the others are", ""] * 5
    plain, packed = (Predictor(bundle, provider).predict(texts) for provider in ("cpu", "cuda"))
    np.testing.assert_allclose([it.score for it in packed], [it.score for it in plain], **tolerance)


@pytest.mark.gpu
def test_a_packed_graph_that_was_changed_is_refused(on_cuda: Any, tmp_path: Path) -> None:
    folder, _one, _tolerance = on_cuda
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "packed.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(Exception, match=r"packed\.onnx was changed"):
        open_bundle(tmp_path)
