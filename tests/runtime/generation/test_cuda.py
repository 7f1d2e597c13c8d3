"""Sessions on a GPU: every token is PyTorch's by the margin that the precision leaves, whoever runs beside."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.generation.budget import CacheFullError
from qrlora_deploy.runtime.generation.cuda_draw import CudaDrawer
from qrlora_deploy.runtime.generation.cuda_step import CudaAnswers
from qrlora_deploy.runtime.generation.machines import Gpu
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationRequest
from qrlora_deploy.runtime.generation.sampling import Choice, Sampler, Sampling
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.table.cuda import HOST_TO_DEVICE, CudaBuffer
from qrlora_deploy.runtime.verification.bounds import DECODER_BOUNDS
from tests.runtime.generation.tiny import NAMES, prompt_of
from tests.runtime.generation.written import Written, write_everything

pytestmark = pytest.mark.makes

OWNERS = (None, *NAMES)
PROMPTS = [(prompt_of(seed, length), OWNERS[seed % 4]) for seed, length in enumerate((3, 21, 1, 40, 8, 16, 7, 30))]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_everything(tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def bundle(written: Written, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.decoders import save_bundle  # needs PyTorch, which a serving host has not

    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    made = written.made
    return save_bundle(folder, made.checkpoint, made.basis, precision=request.param, provider="cuda")


def opened(bundle: Path, written: Written, **options: Any) -> GenerationSession:
    settings = {"provider": "cuda", "max_rows": 4, "block_tokens": 8} | options
    return GenerationSession.open(bundle, written.customers, **settings)


@pytest.fixture(scope="module")
def session(bundle: Path, written: Written) -> Iterator[GenerationSession]:
    with opened(bundle, written, batches=[4]) as found:
        yield found


def check(written: Written, session: GenerationSession, prompt: list[int], answer: GenerationAnswer) -> None:
    """Every token is the likeliest of transformers' own forward behind those before it, or almost as likely."""
    bound = DECODER_BOUNDS[session.bundle.manifest.precision].relative
    logits = written.made.forced(prompt, answer.customer, list(answer.tokens))
    lacking = logits.max(axis=1) - logits[np.arange(len(logits)), list(answer.tokens)]
    assert lacking.max() <= 2 * bound * logits.std()
    assert (lacking == 0).mean() > 0.5


def ask(prompt: list[int], owner: str | None, new: int = 20, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(prompt, owner, Sampling(**sampling), max_tokens=new)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False], ids=["captured graphs", "plain"])
def test_rows_that_join_and_leave_answer_as_pytorch(written: Written, bundle: Path, captured: bool) -> None:
    with opened(bundle, written, cuda_graphs=captured, capacities=[32, 128]) as session:
        requests = [ask(prompt, owner, 6 + 3 * number) for number, (prompt, owner) in enumerate(PROMPTS * 3)]
        answers = session.answers(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.error is None
        check(written, session, list(request.prompt), answer)  # type: ignore[arg-type]
    assert max(answer.reused_tokens for answer in answers) > 0
    different = {answer.tokens for answer in answers if answer.prompt_tokens == 3}
    assert len(different) == 3, "of three lengths"


@pytest.mark.gpu
def test_a_replay_gives_what_a_plain_run_does(written: Written, bundle: Path, session: GenerationSession) -> None:
    requests = [ask(prompt, owner, 12, logprobs=3) for prompt, owner in PROMPTS]
    first, again = session.answers(requests), session.answers(requests)
    assert [answer.logprobs for answer in first] == [answer.logprobs for answer in again], "to the last bit"
    with opened(bundle, written, batches=[4], cuda_graphs=False) as plain:
        expected = plain.answers(requests)
    spread = written.made.forced(*PROMPTS[0], list(first[0].tokens)).std()
    bound = float(DECODER_BOUNDS[session.bundle.manifest.precision].relative * spread)
    for found, other in zip(first, expected, strict=True):
        assert found.logprobs[0].best[0][1] == pytest.approx(other.logprobs[0].best[0][1], abs=bound)


@pytest.mark.gpu
def test_rows_answer_as_alone(session: GenerationSession) -> None:
    """In one size of batch."""
    requests = [ask(prompt, owner) for prompt, owner in PROMPTS]
    together = session.answers(requests)
    alone = [session.submit(request).result() for request in requests]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]


@pytest.mark.gpu
def test_drawing_rows_beside_greedy_ones(session: GenerationSession) -> None:
    drawing = [ask(prompt, owner, temperature=1.2, seed=7, top_k=20) for prompt, owner in PROMPTS]
    greedy = [ask(prompt, owner) for prompt, owner in PROMPTS]
    penalized = [ask(prompt, owner, frequency_penalty=3.0) for prompt, owner in PROMPTS]
    answers = session.answers([*drawing, *greedy, *penalized])
    assert [answer.tokens for answer in answers[:8]] == [session.submit(one).result().tokens for one in drawing]
    assert [answer.tokens for answer in answers[8:16]] == [session.submit(one).result().tokens for one in greedy]
    assert [answer.tokens for answer in answers[16:]] != [answer.tokens for answer in answers[8:16]]


@pytest.mark.gpu
def test_tokens_drawn_on_the_gpu_are_those_that_the_host_draws_of_the_same_logits(
    bundle: Path, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured and not, of one row and of four: each token against the host's own choice by the row's logits."""
    compared = []
    own = CudaDrawer.draw

    def draw(self: CudaDrawer, rows: int, wishes: Any) -> dict[int, Choice]:
        first, again = own(self, rows, wishes), own(self, rows, wishes)
        assert first == again
        compared.append((len(wishes), len(first)))
        return first

    monkeypatch.setattr(CudaDrawer, "draw", draw)
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "logprobs": 5},
        {"temperature": 1.0, "min_p": 0.05},
    ]
    requests = [ask(prompt, owner, seed=row, **kinds[row % 4]) for row, (prompt, owner) in enumerate(PROMPTS)]
    for captured in (True, False):
        with opened(bundle, written, batches=[4], cuda_graphs=captured) as session:
            found = session.answers(requests)
            compared_before = len(compared)
            monkeypatch.setattr(CudaAnswers, "draws", property(lambda _: None, lambda *_: None), raising=False)
            expected = session.answers(requests)
            monkeypatch.delattr(CudaAnswers, "draws")
        assert len(compared) == compared_before
        assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
        for answer, other in zip(found, expected, strict=True):
            for one, another in zip(answer.logprobs, other.logprobs, strict=True):
                assert one.logprob == pytest.approx(another.logprob, abs=1e-4)
    assert sum(asked for asked, _ in compared) == sum(known for _, known in compared) > 100


def check_drawn(device: Device, captured: bool) -> None:
    """Tokens of logits on a GPU, of a vocabulary of which few tokens are looked at first, against the host's."""
    vocabulary, rows = 3001, 8
    logits = np.random.default_rng(0).normal(0, 4, (rows, vocabulary)).astype(np.float16).astype(np.float32)
    logits[5:] /= 40  # hundreds of tokens, about as likely
    buffer = CudaBuffer(logits.nbytes, device.index)
    buffer.copies.copy(buffer.pointer, logits.ctypes.data, logits.nbytes, HOST_TO_DEVICE)
    sessions = Gpu(device, captured)._open_drawing(vocabulary)
    drawer = CudaDrawer(sessions, device.index, buffer.pointer, rows, vocabulary, captured)
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.8}, {"min_p": 0.1}, {"logprobs": 4}]
    equal = 0
    for seed, options in enumerate(kinds):
        samplers = {
            row: Sampler(Sampling(temperature=1.0, seed=100 * seed + row, **options), []) for row in range(rows)
        }
        for _ in range(4):
            wishes = {row: wish for row, it in samplers.items() if (wish := it.wish(vocabulary)) is not None}
            found = drawer.draw(rows, wishes)
            assert list(found) == list(samplers) and drawer.draw(rows, wishes) == found
            for row, choice in found.items():
                expected = samplers[row].choose(logits[row])
                # Where a share falls on the border of two tokens rounding decides.
                equal += choice.token == expected.token
                if choice.token == expected.token and choice.logprob is not None:
                    assert choice.logprob == pytest.approx(expected.logprob, abs=1e-5)
                    assert [token for token, _ in choice.best] == [token for token, _ in expected.best]
    assert equal >= len(kinds) * 4 * rows - 1


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False])
def test_tokens_drawn_on_a_gpu_are_the_hosts(captured: bool) -> None:
    check_drawn(Device("cuda"), captured)


@pytest.mark.gpu
def test_a_customer_swapped_within_an_answer_takes_effect_at_the_next(
    written: Written, bundle: Path, tmp_path: Path
) -> None:
    two = written.customer("two")
    with GenerationSession.open(
        bundle, written.copied(tmp_path / "customers"), provider="cuda", max_rows=4, batches=[4]
    ) as session:
        assert session.customers is not None
        expected = {name: session.submit(ask(*PROMPTS[0][:1], name)).result() for name in ("one", "two")}
        stream = session.submit(ask(PROMPTS[0][0], "one"))
        events = [next(stream) for _ in range(5)]
        session.customers.load("one", two)
        after = session.submit(ask(PROMPTS[0][0], "one"))
        # The table grows meanwhile, and lies elsewhere.
        for number in range(100):
            session.customers.load(f"new-{number}", two)
        running, swapped = [*events, *stream][-1].answer, after.result()
    assert running is not None
    assert (running.tokens, running.customer_digest) == (expected["one"].tokens, written.customer("one").digest)
    assert (swapped.tokens, swapped.customer_digest) == (expected["two"].tokens, two.digest)
    assert expected["one"].tokens != expected["two"].tokens


@pytest.mark.gpu
def test_many_rows_come_and_go(written: Written, bundle: Path) -> None:
    """Caches of two capacities that push each other out of little memory, in batches of all sizes."""
    with opened(bundle, written, max_rows=16, capacities=[16, 64, 128], max_cache_bytes=500_000) as session:
        requests = [ask(prompt, owner, 2 + number % 30) for number, (prompt, owner) in enumerate(PROMPTS * 8)]
        answers = session.answers(requests)
    assert {answer.error for answer in answers} == {None}
    for request, answer in list(zip(requests, answers, strict=True))[::7]:
        check(written, session, list(request.prompt), answer)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_full_cache_is_refused_and_a_full_gpu_has_fewer_rows(written: Written, bundle: Path) -> None:
    with (
        opened(bundle, written, max_cache_bytes=30_000, capacities=[32, 128]) as session,
        pytest.raises(CacheFullError, match="^cache full: 120 tokens of prompt and answer take"),
    ):
        session.submit(ask(prompt_of(0, 100), None))
    # More rows than any GPU has memory for.
    most = 2**22
    with opened(bundle, written, max_rows=most, batches=[1, 4, most], max_cache_bytes=2**50) as session:
        answers = session.answers([ask(prompt, owner) for prompt, owner in PROMPTS[:3]])
        assert {group.cache.rows for group in session._scheduler.groups.values()} <= {0, 4}
    for (prompt, _), answer in zip(PROMPTS, answers, strict=False):
        check(written, session, prompt, answer)


def test_a_gpu_refuses_a_bundle_in_fp32_in_one_line(written: Written) -> None:
    with pytest.raises(
        InputError, match="keeps keys and values in float32, and GPUs compute attention in fp16 and bf16"
    ):
        GenerationSession.open(written.bundle, provider="cuda")
    with pytest.raises(InputError, match="on CPUs and by CUDA"):
        GenerationSession.open(written.bundle, provider="tensorrt")


def test_the_margins_rule_sees_a_wrong_customer(written: Written) -> None:
    """What `check` says is no matter of course: on the host, of an answer under another name."""
    with GenerationSession.open(written.bundle, written.customers, threads=1) as session:
        answer = session.submit(ask(*PROMPTS[1])).result()
    check(written, session, PROMPTS[1][0], answer)
    with pytest.raises(AssertionError):
        check(written, session, PROMPTS[1][0], replace(answer, customer="three"))
