"""The table on a GPU against the one on the host: with a CUDA runtime of plain memory, and with the real one."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, TABLE, TABLE_DTYPES
from qrlora_deploy.runtime.table import cuda
from qrlora_deploy.runtime.table.memory import LEAVING, WAITING, CudaMemory, HostMemory, make_memory
from qrlora_deploy.runtime.table.table import CoefficientTable, rows_of
from tests.runtime.bulks import publish_many
from tests.runtime.fake_cuda import INVALID, FakeCuda

WIDTHS = {TABLE: 24, HEAD_TABLE: 10}
DTYPES = {TABLE: TABLE_DTYPES["fp16"]}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    yield FakeCuda().install(monkeypatch)
    # While it is there: what is given back later would go to a real library.
    gc.collect()


def fill(provider: str) -> dict[str, np.ndarray]:
    """What a table holds after single rows, a bulk with gaps, and growth."""
    random = np.random.default_rng(0)
    table = CoefficientTable(lambda rows: make_memory(WIDTHS, rows, provider, DTYPES), rows=4)
    names = [f"c{number}" for number in range(9)]
    for name in names:
        rows = {part: random.normal(size=width).astype(np.float32) for part, width in WIDTHS.items()}
        table.publish(name, rows)
    for name in names[2:5]:
        table.remove(name)
    blocks = [
        {part: random.normal(size=(count, width)).astype(np.float32) for part, width in WIDTHS.items()}
        for count in (1, 40, 3)
    ]
    publish_many(table, [f"d{number}" for number in range(44)], iter(blocks))
    return {part: memory.read_rows(0, memory.rows) for part, memory in table.memory.parts.items()}


def compare_with_the_host() -> None:
    expected, found = fill("cpu"), fill("cuda")
    for part, rows in expected.items():
        assert rows.dtype == found[part].dtype
        np.testing.assert_array_equal(found[part], rows)


def test_it_holds_what_the_host_would(fake: FakeCuda) -> None:
    compare_with_the_host()
    assert fake.mode == 0 and fake.last_error == 0, "what belongs to the thread is as it was"


@pytest.mark.gpu
def test_it_holds_what_the_host_would_on_a_gpu() -> None:
    compare_with_the_host()


@pytest.mark.parametrize("queries", [0, 1, cuda.QUERIES - 1, cuda.QUERIES, 10**6])
def test_a_row_is_there_when_a_run_may_begin(fake: FakeCuda, queries: int) -> None:
    memory = CudaMemory(8, 16, TABLE_DTYPES["fp16"])
    fake.queries = queries
    fake.calls.clear()
    memory.write(5, np.arange(16, dtype=np.float32))
    assert fake.calls == [], "who writes it asks nothing of the driver"
    memory.settle()
    assert fake.arrived == 1
    assert fake.calls.count("cudaStreamQuery") == min(queries + 1, cuda.QUERIES)
    assert fake.calls.count("cudaStreamSynchronize") == (queries >= cuda.QUERIES)
    # The copy and two for the mode; again two, the questions, and one that clears their "not ready".
    assert len(fake.calls) == 3 + 3 + min(queries + 1, cuda.QUERIES) + (queries >= cuda.QUERIES)
    assert fake.mode == 0 and fake.last_error == 0
    fake.calls.clear()
    memory.settle()
    assert fake.calls == [], "nobody asks twice"
    found = memory.read_rows(4, 3)
    np.testing.assert_array_equal(found[1], np.arange(16, dtype=np.float16))
    assert not found[[0, 2]].any()


def test_a_copy_that_is_refused_is_an_error_and_leaves_the_thread_as_it_was(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = CoefficientTable(lambda rows: make_memory({TABLE: 8}, rows, "cuda"))
    table.publish("a", {TABLE: np.ones(8, np.float32)})
    free = sorted(table._free)
    with monkeypatch.context() as patch:
        patch.setattr(fake, "_memcpyasync", lambda *_: INVALID)
        table.publish("a", {TABLE: np.full(8, 2, np.float32)})
        with pytest.raises(QrloraError, match=r"CUDA refused .* \(error 1\)"):
            table.hold(["a"])
        for number in range(3, WAITING + 1):
            table.publish("a", {TABLE: np.full(8, number, np.float32)})
        with pytest.raises(QrloraError, match=r"CUDA refused .* \(error 1\)"):
            table.publish("a", {TABLE: np.zeros(8, np.float32)})
    assert fake.mode == 0 and len(table._free) == len(free) and table._use.holders == {}
    with monkeypatch.context() as patch:
        patch.setattr(fake, "_streamquery", lambda *_: INVALID)
        with pytest.raises(QrloraError, match=r"CUDA refused .* \(error 1\)"):
            table.hold(["a"])
    assert fake.mode == 0 and table._use.holders == {}
    held, _ = table.hold(["a"])
    assert table.memory.parts[TABLE].read_rows(held["a"], 1)[0].tolist() == [WAITING] * 8


@pytest.mark.parametrize("swaps", [1, WAITING + 1, LEAVING - 1, LEAVING, LEAVING + 1, 5 * LEAVING + 3])
def test_rows_on_their_way_are_not_overwritten(fake: FakeCuda, swaps: int) -> None:
    """Copies that begin in order and arrive late: each must arrive with what it began with."""
    fake.queries = 10**6
    table = CoefficientTable(lambda rows: make_memory({TABLE: 8}, rows, "cuda"), rows=2)
    names = [f"c{number}" for number in range(swaps)]
    for number, name in enumerate(names, start=1):
        table.publish(name, {TABLE: np.full(8, number, np.float32)})
    held, _ = table.hold(names)
    rows = table.memory.parts[TABLE].read_rows(0, table.memory.rows)
    assert rows[rows_of(names, held), 0].tolist() == list(range(1, swaps + 1))


def test_a_row_that_was_left_does_not_come_behind_a_block(fake: FakeCuda) -> None:
    memory = CudaMemory(8, 16)
    memory.write(5, np.ones(16, np.float32))
    memory.write_rows(4, np.full((3, 16), 2, np.float32))
    memory.settle()
    assert memory.read_rows(3, 5)[:, 0].tolist() == [0, 2, 2, 2, 0]


def test_what_does_not_fit_is_refused(fake: FakeCuda) -> None:
    fake.limit_bytes = 3000
    with pytest.raises(QrloraError, match=r"100 rows \(0\.0 GB\) does not fit GPU 0"):
        CudaMemory(100, 16)
    memory = CudaMemory(10, 16)
    for start, count in ((-1, 2), (9, 2), (11, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            memory.read_rows(start, count)
        with pytest.raises(ValueError, match="do not fit"):
            memory.write_rows(start, np.zeros((count, 16), np.float32))


def test_everything_is_given_back(fake: FakeCuda) -> None:
    memory = CudaMemory(10, 16).grown(20)
    staged = memory.staging(3)
    assert staged.shape == (3, 16) and staged.dtype == np.float32 and not staged.any()
    assert len(fake._pieces) > 0
    del memory, staged
    gc.collect()
    assert fake._pieces == {}


def test_host_and_gpu_have_the_same_shape(fake: FakeCuda) -> None:
    for kind in (HostMemory, CudaMemory):
        memory = kind(6, 8, TABLE_DTYPES["fp16"])
        memory.write_rows(2, np.full((2, 8), 3.0, np.float32))
        assert memory.read_rows(0, 6)[:, 0].tolist() == [0, 0, 3, 3, 0, 0]
        assert memory.grown(9).read_rows(2, 7)[:, 0].tolist() == [3, 3, 0, 0, 0, 0, 0]
