"""A session on a whole bundle: customers of a folder, versions, streams, threads, and what is refused."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.errors import InputError, MalformedInputError, MismatchError, NotReadyError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import write_coefficients
from qrlora_deploy.runtime.generation.budget import CacheFullError
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationEvent, GenerationRequest
from qrlora_deploy.runtime.generation.sampling import Sampling
from qrlora_deploy.runtime.generation.session import GenerationSession
from tests.runtime.generation.tiny import NAMES, prompt_of
from tests.runtime.generation.written import Written, write_everything

pytestmark = pytest.mark.makes

PROMPTS = ("play some music", "where is my parcel?", "book a flight to berlin", "what is my balance")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_everything(tmp_path_factory.mktemp("written"))


def open_session(written: Written, customers: Path | None = None, **options: Any) -> GenerationSession:
    settings = {"threads": 1, "max_rows": 4, "block_tokens": 8} | options
    return GenerationSession.open(written.bundle, customers or written.customers, **settings)


@pytest.fixture(scope="module")
def session(written: Written) -> Iterator[GenerationSession]:
    with open_session(written) as opened:
        yield opened


def test_texts_of_any_customers_are_pytorchs(written: Written, session: GenerationSession) -> None:
    asked = [(prompt, owner) for prompt in PROMPTS for owner in (None, *NAMES)]
    answers = session.answers(GenerationRequest(prompt, owner, max_tokens=12) for prompt, owner in asked)
    for (prompt, owner), answer in zip(asked, answers, strict=True):
        # A tokenizer of this kind puts a space before a word that goes on.
        assert answer.text.removeprefix(" ") == written.greedy(prompt, owner, 12)
        assert answer.customer == owner
        assert answer.customer_digest == (written.customer(owner).digest if owner else "")
        assert answer.base_digest == written.made.checkpoint.digest
        assert answer.seed is None


def test_the_pieces_of_a_stream_are_its_answer(session: GenerationSession) -> None:
    events = list(session.submit(GenerationRequest(PROMPTS[0], "one", max_tokens=9, sampling=Sampling(logprobs=2))))
    answer = events[-1].answer
    assert answer is not None and all(event.answer is None for event in events[:-1])
    assert "".join(event.text for event in events) == answer.text
    choices = tuple(choice for event in events for choice in event.choices)
    assert choices == answer.logprobs and tuple(choice.token for choice in choices) == answer.tokens
    assert all(choice.best[0][0] == choice.token for choice in choices)


def test_a_stop_string_ends_an_answer_before_it(session: GenerationSession) -> None:
    whole = session.submit(GenerationRequest(PROMPTS[1], "two", max_tokens=20)).result()
    words = whole.text.split()
    # From the middle of one word to the middle of the next, so across tokens.
    stop = f"{words[4][-1]} {words[5][0]}"
    answer = session.submit(GenerationRequest(PROMPTS[1], "two", max_tokens=20, stop=["nowhere in it", stop])).result()
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert (answer.finish_reason, answer.stop) == ("stop", stop)
    assert len(answer.tokens) < len(whole.tokens)


def test_the_end_token_ends_an_answer(written: Written, session: GenerationSession, tmp_path: Path) -> None:
    """As the bundle's generation_config.json names it; here one that this customer soon says."""
    whole = session.submit(GenerationRequest(PROMPTS[0], "one", max_tokens=12)).result()
    end = whole.tokens[5]
    with open_session(written) as other:
        other._prompts.ends = frozenset([end])
        answer = other.submit(GenerationRequest(PROMPTS[0], "one", max_tokens=12)).result()
    first = whole.tokens.index(end)
    assert answer.tokens == whole.tokens[: first + 1] and answer.finish_reason == "stop"
    assert whole.text.startswith(answer.text) and answer.stop is None


def test_the_context_bounds_an_answer(session: GenerationSession) -> None:
    prompt = prompt_of(1, session.longest - 3)
    answer = session.submit(GenerationRequest(prompt, max_tokens=50)).result()
    assert (len(answer.tokens), answer.finish_reason) == (3, "length")


def test_a_seed_gives_the_same_answer_whatever_runs_beside(written: Written) -> None:
    request = GenerationRequest(PROMPTS[2], "three", Sampling(temperature=1.5, seed=11), max_tokens=15)
    others = [GenerationRequest(prompt, "one", Sampling(temperature=1.0), 10) for prompt in PROMPTS]
    with open_session(written, batches=[4]) as opened:
        alone = opened.submit(request).result()
        together = opened.answers([*others, request, *others])[len(others)]
        drawn = opened.submit(replace(request, sampling=Sampling(temperature=1.5))).result()
        again = opened.submit(replace(request, sampling=Sampling(temperature=1.5, seed=drawn.seed))).result()
    assert together.tokens == alone.tokens and alone.seed == 11
    assert again.tokens == drawn.tokens != alone.tokens


def test_a_customer_swapped_within_an_answer_takes_effect_at_the_next(written: Written, tmp_path: Path) -> None:
    customers = written.copied(tmp_path / "customers")
    one, two = written.customer("one"), written.customer("two")
    with open_session(written, customers) as opened:
        assert opened.customers is not None
        expected = {name: opened.submit(GenerationRequest(PROMPTS[0], name, max_tokens=20)).result() for name in NAMES}
        stream = opened.submit(GenerationRequest(PROMPTS[0], "one", max_tokens=20))
        events = [next(stream) for _ in range(5)]
        opened.customers.load("one", two)
        after = opened.submit(GenerationRequest(PROMPTS[0], "one", max_tokens=20))
        # The table grows meanwhile, and lies elsewhere.
        for number in range(100):
            opened.customers.load(f"new-{number}", two)
        running = [*events, *stream][-1].answer
        swapped = after.result()
    assert running is not None
    assert (running.tokens, running.customer_digest) == (expected["one"].tokens, one.digest)
    assert (swapped.tokens, swapped.customer_digest) == (expected["two"].tokens, two.digest)
    assert expected["one"].tokens != expected["two"].tokens


def test_a_customer_deleted_within_an_answer_writes_it_to_its_end(written: Written, tmp_path: Path) -> None:
    with open_session(written, written.copied(tmp_path / "customers")) as opened:
        assert opened.customers is not None
        expected = opened.submit(GenerationRequest(PROMPTS[3], "three", max_tokens=20)).result()
        stream = opened.submit(GenerationRequest(PROMPTS[3], "three", max_tokens=20))
        next(stream)
        opened.customers.unload("three")
        # Others take rows of the table; none may be the one that is still read.
        for number in range(5):
            opened.customers.load(f"new-{number}", written.customer("one"))
        assert stream.result().tokens == expected.tokens


def test_a_changed_file_goes_live(written: Written, tmp_path: Path) -> None:
    customers = written.copied(tmp_path / "customers")
    with open_session(written, customers) as opened:
        before = opened.submit(GenerationRequest(PROMPTS[0], "one", max_tokens=10)).result()
        changed = threading.Event()
        assert opened.store is not None
        opened.store._report = lambda event: changed.set() if event.kind == "loaded" else None
        write_coefficients(written.customer("two"), customers / "one.safetensors")
        assert changed.wait(20)
        after = opened.submit(GenerationRequest(PROMPTS[0], "one", max_tokens=10)).result()
    assert after.customer_digest == written.customer("two").digest != before.customer_digest


def test_cancelled_answers_end_as_they_are(session: GenerationSession) -> None:
    stream = session.submit(GenerationRequest(PROMPTS[0], "one", max_tokens=50))
    events = [next(stream) for _ in range(4)]
    stream.cancel()
    events += stream
    answer = events[-1].answer
    assert answer is not None and answer.finish_reason == "cancelled" and 4 <= len(answer.tokens) <= 5
    assert stream.result() == answer


def test_who_stops_reading_cancels_what_is_left(session: GenerationSession) -> None:
    events = session.generate(GenerationRequest(prompt, max_tokens=100) for prompt in PROMPTS * 3)
    next(events)
    events.close()  # type: ignore[attr-defined]
    session.submit(GenerationRequest(PROMPTS[0], max_tokens=3)).result()
    assert session._engine.idle


def test_many_threads_read_their_own_streams(session: GenerationSession) -> None:
    requests = [GenerationRequest(PROMPTS[n % 4], (None, *NAMES)[n % 4], max_tokens=10 + n) for n in range(8)]
    expected = [session.submit(request).result().tokens for request in requests]
    found: dict[int, GenerationAnswer] = {}

    def work(number: int) -> None:
        found[number] = session.submit(requests[number]).result()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number].tokens for number in range(8)] == expected


def test_a_time_limit_ends_an_answer(session: GenerationSession) -> None:
    answer = session.submit(GenerationRequest(PROMPTS[0], max_tokens=100, timeout_s=1e-9)).result()
    assert (answer.finish_reason, answer.tokens) == ("deadline", ())


def refused(session: GenerationSession, prompt: Any, customer: str | None = None, **options: Any) -> Exception:
    """What `submit` raises, which is also what `generate` answers, beside a good request that nothing happens to."""
    good = GenerationRequest(PROMPTS[0], max_tokens=2)
    bad = GenerationRequest(prompt, customer, **options)
    with pytest.raises((InputError, NotReadyError)) as caught:
        session.submit(bad)
    answers = session.answers([good, bad, good])
    assert answers[0].tokens == answers[2].tokens and len(answers[0].tokens) == 2
    assert str(answers[1].error) == str(caught.value) and answers[1].finish_reason == "error"
    return caught.value


def test_bad_prompts_are_refused_in_one_line(written: Written, session: GenerationSession) -> None:
    longest = session.longest
    for prompt, kind, text in [
        ("", MalformedInputError, "the prompt is empty"),
        ([], MalformedInputError, "the prompt is empty"),
        (
            prompt_of(0, longest),
            MalformedInputError,
            f"too long: it has {longest} tokens, and the model takes {longest}",
        ),
        ("music " * 500, MalformedInputError, "too long"),
        ([1, -1], MalformedInputError, "the token -1"),
        ([1, 10**6], MalformedInputError, "the token 1000000"),
        ([1, "a"], MalformedInputError, "the token 'a'"),
        ("\ud800", MalformedInputError, "not valid Unicode"),
        (7, MalformedInputError, "not int"),
    ]:
        error = refused(session, prompt)
        assert type(error) is kind and text in str(error) and "\n" not in str(error)


def test_customers_that_cannot_be_served_are_refused_in_one_line(written: Written, tmp_path: Path) -> None:
    customers = written.copied(tmp_path / "customers")
    values = written.made.values[1]
    for name, changes in {"base": {"base_digest": "0" * 64}, "basis": {"basis_digest": "1" * 64}}.items():
        write_coefficients(written.coefficients(values, **changes), customers / f"other-{name}.safetensors")
    (customers / "damaged.safetensors").write_bytes(b"no file")
    with open_session(written, customers) as opened:
        assert isinstance(refused(opened, PROMPTS[0], "nobody"), UnknownCustomerError)
        assert "was trained on base 000000000000" in str(refused(opened, PROMPTS[0], "other-base"))
        assert isinstance(refused(opened, PROMPTS[0], "other-basis"), MismatchError)
        assert "damaged.safetensors" in str(refused(opened, PROMPTS[0], "damaged"))


def test_a_full_cache_is_refused(written: Written) -> None:
    with open_session(written, max_cache_bytes=90_000, capacities=[32, 128]) as opened:
        error = refused(opened, prompt_of(0, 100))
        assert isinstance(error, CacheFullError)
        assert str(error).startswith("cache full: 128 tokens of prompt and answer take 98304 bytes of cache")
    with open_session(written, max_waiting=2) as opened:
        for _ in range(2):
            opened.submit(GenerationRequest(PROMPTS[0]))
        with pytest.raises(CacheFullError, match="^cache full: 2 requests wait"):
            opened.submit(GenerationRequest(PROMPTS[0]))


def test_a_closed_session_answers_what_it_had_begun_and_takes_nothing(written: Written) -> None:
    opened = open_session(written)
    stream = opened.submit(GenerationRequest(PROMPTS[0], max_tokens=50))
    first: GenerationEvent = next(stream)
    opened.close()
    answer = stream.result()
    assert answer.finish_reason == "cancelled" and answer.tokens[:1] == (first.choices[0].token,)
    with pytest.raises(NotReadyError, match="closed"):
        opened.submit(GenerationRequest(PROMPTS[0]))


def test_a_merged_bundle_answers_for_its_customer(written: Written, session: GenerationSession, tmp_path: Path) -> None:
    from exporters.onnx.exporter import EXPORTER
    from exporters.onnx.options import OnnxOptions
    from qrlora_deploy.exporting.job import ExportJob

    one = written.customer("one")
    EXPORTER.export(ExportJob(written.made.checkpoint, written.made.basis, tmp_path / "merged", one), OnnxOptions())
    with GenerationSession.open(tmp_path / "merged", threads=1) as merged:
        requests = [GenerationRequest(prompt, max_tokens=12) for prompt in PROMPTS]
        answers = merged.answers(requests)
        assert isinstance(refused(merged, PROMPTS[0], "one"), UnknownCustomerError)
    expected = session.answers(replace(request, customer="one") for request in requests)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert {answer.customer_digest for answer in answers} == {one.digest}
    with pytest.raises(InputError, match="is a merged bundle and takes no customers"):
        GenerationSession.open(tmp_path / "merged", written.customers)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_of_few_bits_answer_in_a_batch_as_alone(written: Written, precision: str, tmp_path: Path) -> None:
    import onnx

    from tests.decoders import save_bundle

    made = written.made
    bundle = save_bundle(tmp_path / "bundle", made.checkpoint, made.basis, precision=precision)
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    levels = [item.i for node in products for item in node.attribute if item.name == "accuracy_level"]
    assert len(levels) == len(products) > 0
    with GenerationSession.open(bundle, written.customers, threads=1, max_rows=4, batches=[4]) as opened:
        assert {opened.bundle.manifest.accuracy_level} == set(levels) == {4}
        requests = [GenerationRequest(PROMPTS[n], (None, *NAMES)[n], max_tokens=12) for n in range(4)]
        alone = [opened.submit(request).result().tokens for request in requests]
        assert [answer.tokens for answer in opened.answers(requests)] == alone


def test_a_bundle_of_another_task_is_refused(switchable: Path) -> None:
    with pytest.raises(InputError, match="is for text-classification and writes no text"):
        GenerationSession.open(switchable)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": 1.5}, "max_tokens must be"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"stop": "word"}, "stop must be a list"),
    ],
)
def test_bad_requests_name_what_is_wrong(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=f"^{text}"):
        GenerationRequest("text", **options)


def test_ids_may_be_numpys(session: GenerationSession) -> None:
    ids = np.array(prompt_of(4, 6))
    prompts: list[Any] = [ids, list(ids), tuple(ids.tolist())]
    answers = [session.submit(GenerationRequest(prompt, max_tokens=4)).result() for prompt in prompts]
    assert len({answer.tokens for answer in answers}) == 1 and answers[0].prompt_tokens == 6
    assert "the token [4, 5]" in str(refused(session, np.array([[4, 5]])))
