"""What runs on a GPU, on one of plain memory: the same answers as on the host, and what is captured and copied."""

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from qrlora_deploy.errors import NotReadyError, QrloraError
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.generation import cuda_draw, machines, session
from qrlora_deploy.runtime.generation.budget import CacheFullError
from qrlora_deploy.runtime.generation.cache import KvCache
from qrlora_deploy.runtime.generation.cuda_cache import CudaKvCache
from qrlora_deploy.runtime.generation.cuda_graph import piece_lengths
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationRequest
from qrlora_deploy.runtime.generation.sampling import Sampling
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.runtime.host.devices import Device
from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.generation.pretend_gpu import PretendDesk, PretendSession, with_greedy
from tests.runtime.generation.tiny import NAMES, Desk, Made, answer_of, make_decoder, prompt_of
from tests.runtime.generation.written import Written, write_everything

pytestmark = pytest.mark.makes

OWNERS = (None, *NAMES)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    yield FakeCuda().install(monkeypatch)
    # While it is there: what is given back later would go to a real library.
    gc.collect()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("decoder")
    return with_greedy(make_decoder(folder), folder / "chooses")


ASKED = [(prompt_of(seed, length), OWNERS[seed % 4]) for seed, length in enumerate((3, 21, 1, 40, 8, 16, 7, 30))]


@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("captured", [True, False])
def test_rows_that_join_and_leave_answer_as_on_the_host(fake: FakeCuda, made: Made, block: int, captured: bool) -> None:
    settings: dict[str, Any] = {"capacities": (24, 64), "block": block}
    found, expected = [], []
    for desk, tokens in ((PretendDesk(made, **settings), found), (Desk(made, **settings), expected)):
        if isinstance(desk, PretendDesk):
            desk.graph._captured = captured
        asked = []
        for number, (prompt, owner) in enumerate(ASKED):
            sampled = {"temperature": 0.9, "seed": number} if number % 3 == 2 else {}
            asked.append(desk.ask(prompt, owner, 5 + 2 * number, **sampled))
            desk.engine.step()
        desk.finish()
        # Again, with beginnings that are known.
        asked += [desk.ask(prompt, owner, 12) for prompt, owner in ASKED]
        desk.finish()
        assert max(answer_of(running).reused_tokens for running in asked) == 32
        tokens += [answer_of(running).tokens for running in asked]
        assert {answer_of(running).error for running in asked} == {None}
        assert desk.holders.held == 0
    assert found == expected
    assert fake.mode == 0 and fake.last_error == 0


def test_batches_and_beginnings_of_prompts_are_captured_once(fake: FakeCuda, made: Made) -> None:
    desk = PretendDesk(made, max_rows=2, block=32)
    for prompt, owner in ASKED:
        desk.ask(prompt, owner)
    desk.finish()
    counts = Counter(desk.session.graphs)
    # Batches of one and of two rows; beginnings of up to 16, 24 and 32 tokens, and one prompt that goes on.
    assert set(counts) == {"-1", "1", "2", "3", "4", "5"} and counts["-1"] == 1
    # The caches lie where they were, although nobody had a row.
    desk.alone(*ASKED[0])
    assert set(desk.session.graphs) == set(counts)


def test_a_table_that_has_moved_is_captured_anew(fake: FakeCuda, made: Made) -> None:
    desk = PretendDesk(made)
    before = desk.alone(*ASKED[0]).tokens
    assert set(desk.session.graphs) == {"1", "2"}, "a beginning, and a batch of one"
    desk.holders.memory = desk.holders.memory.grown(9)
    assert desk.alone(*ASKED[0]).tokens == before
    assert set(desk.session.graphs) == {"1", "2", "3", "4"}
    assert {bound.memory for bound in desk.graph._bound.values()} == {desk.holders.memory}


def test_pieces_of_prompts_have_few_lengths() -> None:
    assert piece_lengths(8) == (8,)
    assert piece_lengths(128) == (16, 24, 32, 48, 64, 96, 128)
    assert piece_lengths(100) == (16, 24, 32, 48, 64, 96, 100)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """More tokens than are looked at as candidates."""
    folder = tmp_path_factory.mktemp("wide")
    return with_greedy(make_decoder(folder, vocab_size=1500), folder / "chooses")


DRAWN: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"temperature": 0.5, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "logprobs": 4},
    {"logprobs": 2},
    {"temperature": 30.0, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.3},
    {"temperature": 0.8, "top_k": 300},
    {},
]


def test_rows_draw_where_their_logits_lie_as_on_the_host(fake: FakeCuda, wide: Made) -> None:
    answers = []
    for make in (PretendDesk, Desk):
        desk = make(wide, max_rows=8)
        asked = [desk.ask(*ASKED[row], 10, seed=row, **options) for row, options in enumerate(DRAWN)]
        desk.finish()
        answers.append([answer_of(running) for running in asked])
    for found, expected in zip(*answers, strict=True):
        assert found.tokens == expected.tokens
        for one, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [token for token, _ in one.best] == [token for token, _ in other.best]
    assert [len(answer.logprobs) for answer in answers[0]] == [0, 0, 10, 10, 0, 0, 0, 0]
    # Each row alone, with its own neighbours gone.
    desk = PretendDesk(wide)
    for row, options in enumerate(DRAWN):
        assert desk.alone(*ASKED[row], 10, seed=row, **options).tokens == answers[0][row].tokens


@pytest.mark.parametrize(("number", "times"), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 10), (6, 10), (7, 0)])
def test_logits_come_only_where_a_token_needs_them(fake: FakeCuda, wide: Made, number: int, times: int) -> None:
    desk, read = PretendDesk(wide), list[int]()
    row_bytes = desk.graph.vocabulary * 4
    begin = fake._memcpyasync
    fake._memcpyasync = lambda *place: (read.append(place[2]), begin(*place))[1]  # type: ignore[method-assign]
    desk.ask(prompt_of(0, 5), "one", 10)
    drawing = desk.ask(prompt_of(1, 5), "two", 10, seed=1, **DRAWN[number])
    desk.finish()
    assert len(answer_of(drawing).tokens) == 10
    assert read.count(row_bytes) == times


def test_without_room_to_draw_there_the_host_draws(fake: FakeCuda, wide: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = PretendDesk(wide)

    def refuse(*_: Any) -> None:
        raise QrloraError("Failed to allocate memory for requested buffer")

    monkeypatch.setattr(cuda_draw, "run_bound", refuse)
    expected = Desk(wide).alone(*ASKED[0], 10, seed=3, temperature=0.7)
    assert desk.alone(*ASKED[0], 10, seed=3, temperature=0.7).tokens == expected.tokens


def test_a_decoder_that_does_not_choose_answers_by_its_logits(fake: FakeCuda, tmp_path: Path) -> None:
    made = make_decoder(tmp_path)
    desk = PretendDesk(made)
    desk.graph._memory.sizes.__dict__["chooses"] = False
    assert desk.alone(*ASKED[1]).tokens == Desk(made).alone(*ASKED[1]).tokens


def test_numbers_that_are_not_finite_end_their_row_alone(fake: FakeCuda, made: Made) -> None:
    desk = PretendDesk(made, batches=(4,))
    good, bad = desk.ask(prompt_of(0, 5), "one"), desk.ask(prompt_of(0, 5), "two")
    width = desk.holders.memory.parts["coefficient_table"].width
    desk.holders.memory.parts["coefficient_table"].write_rows(2, np.full((1, width), np.nan, np.float32))
    desk.finish()
    assert "two: the model gave nan" in str(answer_of(bad).error)
    assert answer_of(good).tokens == Desk(made, batches=(4,)).alone(prompt_of(0, 5), "one").tokens


def test_a_gpu_without_memory_is_a_full_cache(fake: FakeCuda, made: Made) -> None:
    desk = PretendDesk(made, capacities=(16, 64))
    part_bytes = desk.graph.cache_shape.token_bytes(64) // len(desk.graph.cache_shape.names)
    # Room for two rows of a buffer.
    fake.limit_bytes = 2 * part_bytes
    asked = [desk.ask(prompt_of(seed, 30), "one", 12) for seed in range(5)]
    desk.finish()
    expected = [Desk(made).alone(prompt_of(seed, 30), "one", 12).tokens for seed in range(5)]
    assert [answer_of(running).tokens for running in asked] == expected
    assert desk.scheduler.groups[64].cache.rows == 2
    # None at all.
    fake.limit_bytes = 2**30
    desk = PretendDesk(made, capacities=(64,))
    fake.limit_bytes = part_bytes - 1
    refused = desk.ask(prompt_of(0, 30), "one", 12)
    desk.finish()
    error = answer_of(refused).error
    assert isinstance(error, CacheFullError) and str(error).startswith("cache full: there is no memory for")
    fake.limit_bytes = 2**30
    assert desk.alone(prompt_of(0, 30), "one", 12).tokens == expected[0]


def test_a_cache_on_a_gpu_holds_what_one_on_the_host_does(fake: FakeCuda, made: Made) -> None:
    shape = PretendDesk(made).graph.cache_shape
    random = np.random.default_rng(0)
    caches = KvCache(shape, 12), CudaKvCache(shape, 12)
    for cache in caches:
        cache.resize(3)
    for buffer, array in zip(caches[1]._filled(), caches[0]._arrays, strict=True):
        array[:] = random.normal(size=array.shape)
        caches[1]._copies.copy(buffer.pointer, array.ctypes.data, array.nbytes, 1)
    for cache in caches:
        cache.resize(4)
        cache.copy_row(2, 3, 12)
        cache.write(1, 5, cache.read(2, 2, 7))  # type: ignore[attr-defined]
        cache.clear_row(0)
        cache.resize(4)
        cache.resize(5)
    for buffer, array in zip(caches[1]._filled(), caches[0]._arrays, strict=True):
        found = np.zeros_like(array)
        caches[1]._copies.copy(found.ctypes.data, buffer.pointer, found.nbytes, 2)
        np.testing.assert_array_equal(found, array)
        assert np.count_nonzero(found) == found[1:4].size


@pytest.fixture
def on_gpu(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions for "cuda" are pretended, and such a GPU takes fp32."""

    def open_session(model: Path, device: Device, *_: Any, **__: Any) -> Any:
        opened = onnxruntime.InferenceSession(model)
        return PretendSession(opened) if device.provider == "cuda" else opened

    def shared_session(_: Bundle, model: Path, device: Device, *__: Any) -> Any:
        return open_session(model, device)

    monkeypatch.setattr(session, "shared_session", shared_session)
    monkeypatch.setattr(machines, "open_session", open_session)
    monkeypatch.setattr(machines, "GPU_CACHES", ("float32",))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_everything(tmp_path_factory.mktemp("written"))


def test_a_session_on_a_gpu_answers_as_on_the_host(on_gpu: None, written: Written) -> None:
    requests = [
        GenerationRequest(prompt, owner, Sampling(temperature=number % 2, seed=number), max_tokens=12)
        for number, (prompt, owner) in enumerate(ASKED)
    ]
    with GenerationSession.open(written.bundle, written.customers, threads=1) as host:
        expected = host.answers(requests)
        swapped = host.submit(replace(requests[2], customer="one")).result()
    found: dict[int, GenerationAnswer] = {}
    with GenerationSession.open(written.bundle, written.customers, provider="cuda") as opened:

        def work(number: int) -> None:
            found[number] = opened.submit(requests[number]).result()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # A swap within an answer, and a table that grows beneath it.
        stream = opened.submit(requests[2])
        events = [next(stream) for _ in range(3)]
        assert opened.customers is not None
        for name in ("two", *(f"new-{number}" for number in range(80))):
            opened.customers.load(name, written.customer("one"))
        after = opened.submit(requests[2]).result()
        running = [*events, *stream][-1].answer
    assert [found[number].tokens for number in range(len(requests))] == [answer.tokens for answer in expected]
    assert running is not None and running.tokens == expected[2].tokens
    assert (after.tokens, after.customer_digest) == (swapped.tokens, swapped.customer_digest)
    assert running.customer_digest != after.customer_digest


def test_a_forked_child_is_told_so(on_gpu: None, written: Written) -> None:
    opened = GenerationSession.open(written.bundle, provider="cuda")
    stream = opened.submit(GenerationRequest([5, 6], max_tokens=2))
    opened._machine.after_fork(in_child=True)  # type: ignore[attr-defined]
    with pytest.raises(NotReadyError, match="cannot be used in a forked process"):
        stream.result()
