"""Choosing tokens: against transformers' own processors, ties, seeds, probabilities, and what is refused."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.runtime.generation import choosing, drawing
from qrlora_deploy.runtime.generation.choosing import Chooser
from qrlora_deploy.runtime.generation.drawing import Filters, best, draw
from qrlora_deploy.runtime.generation.sampling import Sampler, Sampling, uniform
from qrlora_deploy.runtime.generation.stepping import HostAnswers

VOCABULARY = 50


def random_logits(seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, VOCABULARY).astype(np.float32)


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """What a sampler may draw from."""
    filters = Filters(sampling.top_k, sampling.top_p, sampling.min_p)
    return drawing.candidates(logits, sampling.temperature, filters)


def of_transformers(logits: np.ndarray, history: list[int], sampling: Sampling) -> np.ndarray:
    """Probabilities `[vocabulary]` by transformers' processors, in the order in which its `generate` applies them."""
    torch = pytest.importorskip("torch")
    made: Any = pytest.importorskip("transformers.generation.logits_process")
    processors = [
        (sampling.repetition_penalty != 1, lambda: made.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)),
        (True, lambda: made.TemperatureLogitsWarper(float(sampling.temperature))),
        (sampling.top_k > 0, lambda: made.TopKLogitsWarper(sampling.top_k)),
        (sampling.top_p < 1, lambda: made.TopPLogitsWarper(sampling.top_p)),
        (sampling.min_p > 0, lambda: made.MinPLogitsWarper(sampling.min_p)),
    ]
    scores, ids = torch.tensor(logits, dtype=torch.float64)[None], torch.tensor([history])
    for wanted, make in processors:
        if wanted:
            scores = make()(ids, scores)
    found: np.ndarray = torch.softmax(scores, dim=-1)[0].numpy()
    return found


@pytest.mark.makes
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 2.0, "top_p": 0.5, "repetition_penalty": 0.7},
    ],
)
def test_probabilities_are_those_of_transformers(seed: int, options: dict[str, Any]) -> None:
    sampling = Sampling(**options)
    logits = random_logits(seed)
    prompt = [3, 3, 17, 42]
    sampler = Sampler(sampling, prompt)
    ids, probabilities = candidates(sampler._penalized(logits), sampling)
    found = np.zeros(VOCABULARY)
    found[ids] = probabilities
    np.testing.assert_allclose(found, of_transformers(logits, prompt, sampling), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_of_a_large_vocabulary_the_same_tokens_are_kept(scale: float, share: float) -> None:
    """Where few tokens hold the share not all are sorted."""
    logits = np.random.default_rng(1).normal(0, scale, 5000).round(2).astype(np.float32)  # with many equal ones
    ids, probabilities = candidates(logits, Sampling(temperature=1.0, top_p=share))
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum()
    best = sorted(range(5000), key=lambda token: (-exact[token], token))
    count = int(np.searchsorted(exact[best].cumsum(), share)) + 1
    assert ids.tolist() == sorted(best[:count])
    np.testing.assert_allclose(probabilities, exact[ids] / exact[ids].sum(), rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1000), st.integers(1, 9000), st.data())
def test_the_best_are_those_that_sorting_finds(seed: int, size: int, data: st.DataObject) -> None:
    values = np.random.default_rng(seed).normal(0, 3, size).round(data.draw(st.integers(0, 3))).astype(np.float32)
    values[values < data.draw(st.sampled_from([-99, 0]))] = -np.inf
    count = data.draw(st.integers(1, size))
    assert best(values, count).tolist() == sorted(np.argsort(-values, kind="stable")[:count].tolist())


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1000), st.integers(1, 3000), st.floats(0, 1, exclude_max=True))
def test_of_all_tokens_the_one_is_drawn_where_the_sum_passes(seed: int, size: int, share: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    logits[np.random.default_rng(seed + 1).random(size) < 0.3] = -np.inf
    logits[seed % size] = 3
    probabilities = np.exp(logits.astype(np.float64) / 0.7)
    sums = np.concatenate([[0], probabilities.cumsum() / probabilities.sum()])
    token = draw(logits, 0.7, Filters(), share)
    assert probabilities[token] > 0
    # Weights in fp32: a border is where fp64 has it, but for so much.
    assert sums[token] - 1e-6 <= share <= sums[token + 1] + 1e-6


def test_repetition_penalty_grows_with_the_answer() -> None:
    sampler = Sampler(Sampling(repetition_penalty=4.0), [0])
    logits = np.array([4.0, 3.0, 2.0, -1.0], dtype=np.float32)
    # 4 / 4 = 1 from the start, then 3 / 4, then 2 / 4.
    assert [sampler.choose(logits).token for _ in range(3)] == [1, 2, 0]


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = np.array([1.0, 0.9, 0.0], dtype=np.float32)
    presence = Sampler(Sampling(presence_penalty=0.5), [0, 0, 0])
    assert [presence.choose(logits).token for _ in range(4)] == [0, 1, 0, 0]
    frequency = Sampler(Sampling(frequency_penalty=0.3), [0, 0, 0])
    # 1, .9 | .7, .9 | .7, .6 | .4, .6 | .4, .3
    assert [frequency.choose(logits).token for _ in range(5)] == [0, 1, 0, 1, 0]


def test_of_equal_ones_the_lowest_id_is_chosen() -> None:
    logits = np.array([0.0, 2.0, 2.0, 1.0, 2.0], dtype=np.float32)
    assert Sampler(Sampling(), []).choose(logits).token == 1
    assert candidates(logits, Sampling(temperature=1.0, top_k=2))[0].tolist() == [1, 2]
    assert candidates(logits, Sampling(temperature=1.0, top_p=0.4))[0].tolist() == [1, 2]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(0, 2**32))
def test_a_draw_follows_from_seed_and_step_alone(seed: int, steps: int, other: int) -> None:
    first = uniform(seed, steps)
    np.random.default_rng(other).random(10)  # other rows draw meanwhile
    assert uniform(seed, steps) == first
    assert 0 <= first < 1
    assert uniform(seed, steps + 1) != first


def test_draws_have_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    drawn = Counter(Sampler(Sampling(temperature=1.0, seed=seed), []).choose(logits).token for seed in range(4000))
    # Four standard deviations of a share of 4000 draws.
    for token, share in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert abs(drawn[token] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_a_seed_that_is_not_given_is_told() -> None:
    first = Sampler(Sampling(temperature=1.0), [])
    tokens = [first.choose(random_logits(step)).token for step in range(20)]
    again = Sampler(Sampling(temperature=1.0, seed=first.seed), [])
    assert [again.choose(random_logits(step)).token for step in range(20)] == tokens


def test_logprobs_are_those_of_the_model() -> None:
    logits = random_logits(5)
    choice = Sampler(Sampling(temperature=0.3, top_k=3, seed=1, logprobs=4), []).choose(logits)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert choice.logprob == pytest.approx(exact[choice.token], abs=1e-12)
    best = np.argsort(-exact)[:4]
    assert [token for token, _ in choice.best] == best.tolist()
    np.testing.assert_allclose([value for _, value in choice.best], exact[best], rtol=0, atol=1e-12)
    alone = Sampler(Sampling(logprobs=0), []).choose(logits)
    assert alone.logprob is not None and alone.best == ()
    assert Sampler(Sampling(), []).choose(logits).logprob is None


def test_tiny_temperatures_do_not_overflow() -> None:
    logits = np.array([500.0, 400.0, -np.inf], dtype=np.float32)
    ids, probabilities = candidates(logits, Sampling(temperature=1e-300))
    np.testing.assert_array_equal(probabilities, [1, 0, 0])
    assert ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = random_logits(0)
    logits[7] = bad
    with pytest.raises(QrloraError, match="the model gave"):
        Sampler(Sampling(), []).choose(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", None),
        ("top_k", None),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", 1.5),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", "1"),
        ("seed", 2**64),
        ("seed", True),
        ("logprobs", 21),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} must be "):
        Sampling(**{name: value})


def test_threads_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "PART_LOGITS", 3 * VOCABULARY)
    options = [
        {"temperature": 0.8},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 5, "logprobs": 2},
    ]
    options += [{"temperature": 0.7, "frequency_penalty": 0.5}, {"logprobs": 1}]
    rows = {row: options[row % len(options)] for row in range(23)}
    logits = np.stack([random_logits(100 + row) for row in rows])
    spoilt = logits.copy()
    spoilt[7, 3] = np.nan
    found = []
    for threads in (1, 4):
        samplers = {row: Sampler(Sampling(seed=row, **given), [1, 2]) for row, given in rows.items()}  # type: ignore[arg-type]
        chooser = Chooser(threads)
        first, wrong, last = (chooser.all(samplers, HostAnswers(values)) for values in (logits, spoilt, logits))
        chooser.close()
        assert isinstance(wrong.pop(7), QrloraError) and list(first) == list(rows)
        found.append((first, wrong, last))
    assert found[0] == found[1]
    expected = [Sampler(Sampling(seed=row, **given), [1, 2]).choose(logits[row]) for row, given in rows.items()]  # type: ignore[arg-type]
    assert list(found[1][0].values()) == expected and len({choice.token for choice in expected}) > 5
