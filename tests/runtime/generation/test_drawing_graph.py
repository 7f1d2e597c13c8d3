"""The graph that draws where the logits lie: token by token what the host draws, and only as far as it can know."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from qrlora_deploy.runtime.generation import drawing
from qrlora_deploy.runtime.generation.drawing import Filters
from qrlora_deploy.runtime.generation.sampling import Choice, Sampler, Sampling, uniform
from qrlora_deploy.runtime.generation.wishes import (
    ANSWERS,
    CANDIDATES,
    DRAWN,
    FILE,
    FILE_OF_ALL,
    IDS,
    LOGPROB,
    LOGPROBS,
    SETTINGS,
)

ROWS = 48

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1e-4, "top_p": 0.9},
    {"temperature": 0.9, "top_k": 256, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.1, "top_k": 10**6},
    {},
]


@pytest.fixture(scope="module")
def graph() -> Any:
    return onnxruntime.InferenceSession(FILE)


@pytest.fixture(scope="module")
def graph_of_all() -> Any:
    return onnxruntime.InferenceSession(FILE_OF_ALL)


def some_logits(vocabulary: int, scale: float, seed: int = 0) -> np.ndarray:
    """`[ROWS, vocabulary]` fp32 on fp16's grid, where many are equal."""
    found = np.random.default_rng(seed).normal(0, scale, (ROWS, vocabulary))
    return found.astype(np.float16).astype(np.float32)


def drawn(graph: Any, logits: np.ndarray, samplers: list[Sampler]) -> list[Choice | None]:
    """What the graph answers."""
    wishes = [sampler.wish(logits.shape[1]) for sampler in samplers]
    answers = dict(zip(ANSWERS, graph.run(list(ANSWERS), {"logits": logits} | settings_of(wishes)), strict=True))
    assert {name: array.dtype for name, array in answers.items()} == {name: kind for name, (kind, _) in ANSWERS.items()}
    best = [
        tuple(zip(*row, strict=True)) for row in zip(answers[IDS].tolist(), answers[LOGPROBS].tolist(), strict=True)
    ]
    found = zip(answers[DRAWN][:, 0].tolist(), answers[LOGPROB][:, 0].tolist(), best, strict=True)
    return [None if token < 0 else Choice(token, logprob, pairs) for token, logprob, pairs in found]


def settings_of(wishes: list[Any]) -> dict[str, np.ndarray]:
    return {name: np.array([[getattr(wish, name)] for wish in wishes], np.float64) for name in SETTINGS}


def kept(logits: np.ndarray, sampling: Sampling) -> int:
    """How many tokens may be drawn."""
    filters = Filters(sampling.top_k, sampling.top_p, sampling.min_p)
    return len(drawing.candidates(logits, sampling.temperature, filters)[0])


@pytest.mark.parametrize("scale", [0.3, 4.0])
@pytest.mark.parametrize("vocabulary", [12, 185, 3001])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_tokens_are_those_of_the_host(graph: Any, options: dict[str, Any], vocabulary: int, scale: float) -> None:
    logits = some_logits(vocabulary, scale)
    samplers = [Sampler(Sampling(seed=row, logprobs=5, **options), []) for row in range(ROWS)]
    for row, choice in enumerate(drawn(graph, logits, samplers)):
        if choice is None:
            # A few thousand tokens, about as likely: more than are looked at.
            assert kept(logits[row], samplers[row].sampling) > CANDIDATES
            continue
        expected = samplers[row].choose(logits[row])
        assert choice.token == expected.token
        assert choice.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [token for token, _ in choice.best[:5]] == [token for token, _ in expected.best]
        np.testing.assert_allclose(
            [value for _, value in choice.best[:5]], [value for _, value in expected.best], rtol=0, atol=1e-5
        )


def test_only_rows_that_need_more_are_left_to_the_host(graph: Any) -> None:
    logits = some_logits(3001, 4.0)
    logits[::2] /= 40
    samplers = [Sampler(Sampling(temperature=1.0, top_p=0.9, seed=row), []) for row in range(ROWS)]
    left = [choice is None for choice in drawn(graph, logits, samplers)]
    assert left == [kept(logits[row], samplers[row].sampling) > CANDIDATES for row in range(ROWS)]
    assert 0 < sum(left) < ROWS


def test_a_rows_neighbours_change_nothing(graph: Any) -> None:
    logits = some_logits(700, 2.0)
    samplers = [Sampler(Sampling(seed=row, **KINDS[row % len(KINDS)]), []) for row in range(ROWS)]
    alone = [drawn(graph, logits[row : row + 1], samplers[row : row + 1])[0] for row in range(ROWS)]
    for found, one in zip(drawn(graph, logits, samplers), alone, strict=True):
        assert found is not None and one is not None and found.token == one.token
        assert found.logprob == pytest.approx(one.logprob, abs=1e-6)


def test_draws_have_the_probabilities(graph: Any) -> None:
    """Of all tokens, and of those that top-p leaves: four standard deviations of a share of as many draws."""
    logits = np.repeat(some_logits(600, 1.5)[:1], 4000, axis=0)
    for options in ({}, {"top_p": 0.6}):
        sampling = Sampling(temperature=1.0, **options)
        ids, probabilities = drawing.candidates(logits[0], 1.0, Filters(0, sampling.top_p, 0.0))
        samplers = [Sampler(Sampling(temperature=1.0, seed=seed, **options), []) for seed in range(len(logits))]
        tokens = [choice.token for choice in drawn(graph, logits, samplers) if choice is not None]
        counts = np.bincount(tokens, minlength=600)
        assert counts.sum() == counts[ids].sum() == len(logits)
        bound = 4 * np.sqrt(probabilities * (1 - probabilities) / len(logits)) + 1 / len(logits)
        assert (np.abs(counts[ids] / len(logits) - probabilities) < bound).all()


def test_logits_that_are_no_numbers_and_temperatures_of_nothing_are_left_to_the_host(graph: Any) -> None:
    logits = some_logits(300, 1.0)
    logits[0, 7], logits[1, 299], logits[2] = np.nan, np.inf, -np.inf
    logits[3, :200] = -np.inf
    samplers = [Sampler(Sampling(temperature=1.0, seed=row), []) for row in range(ROWS)]
    samplers[4] = Sampler(Sampling(temperature=1e-300, seed=4), [])
    found = drawn(graph, logits, samplers)
    assert [row for row, choice in enumerate(found) if choice is None] == [0, 1, 2, 4]
    assert found[3] is not None and found[3].token == samplers[3].choose(logits[3]).token >= 200


def test_what_the_graph_cannot_know_is_not_asked() -> None:
    assert Sampler(Sampling(temperature=1.0, frequency_penalty=1.0), []).wish(3000) is None
    assert Sampler(Sampling(repetition_penalty=1.1), [1]).wish(3000) is None
    assert Sampler(Sampling(temperature=1.0, top_k=CANDIDATES + 1), []).wish(3000) is None
    assert Sampler(Sampling(temperature=1.0, top_k=CANDIDATES + 1), []).wish(CANDIDATES + 1) is not None


@pytest.mark.parametrize("on_grid", [True, False], ids=["many equal", "few equal"])
@pytest.mark.parametrize("vocabulary", [12, 300, 3001])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 2.0, "min_p": 0.3},
        {"temperature": 0.8, "top_p": 0.99, "min_p": 0.05},
        {"temperature": 0.02, "top_p": 0.05},
    ],
    ids=str,
)
def test_of_all_tokens_those_of_the_host_are_drawn(
    graph_of_all: Any, options: dict[str, Any], vocabulary: int, on_grid: bool
) -> None:
    """A token is another one only where the share falls on the border between the two, to rounding."""
    settled = 0
    for scale in (0.05, 1.0, 6.0):
        logits = some_logits(vocabulary, scale)
        if not on_grid:
            logits = np.random.default_rng(1).normal(0, scale, logits.shape).astype(np.float32)
        samplers = [Sampler(Sampling(seed=row, logprobs=0, **options), []) for row in range(ROWS)]
        tokens, logprobs = graph_of_all.run(
            [DRAWN, LOGPROB], {"logits": logits} | settings_of([sampler.wish(10**6) for sampler in samplers])
        )
        for row, sampler in enumerate(samplers):
            filters = Filters(0, sampler.sampling.top_p, sampler.sampling.min_p)
            ids, probabilities = drawing.candidates(logits[row], sampler.sampling.temperature, filters)
            place = ids.tolist().index(int(tokens[row, 0]))
            upper = probabilities[: place + 1].sum()
            share = uniform(row, 0)
            assert upper - probabilities[place] - 2e-6 <= share <= upper + 2e-6
            expected = sampler.choose(logits[row])
            settled += int(tokens[row, 0]) == expected.token
            if int(tokens[row, 0]) == expected.token:
                assert logprobs[row, 0] == pytest.approx(expected.logprob, abs=1e-5)
    assert settled >= 3 * ROWS - 2


@pytest.mark.makes
def test_the_files_are_what_the_exporter_writes() -> None:
    import onnx  # a serving host has it not

    from exporters.onnx.decoder.drawing import drawing_graph
    from exporters.onnx.decoder.drawing_of_all import drawing_of_all

    again = "write them anew: python -m exporters.onnx.decoder.drawing"
    assert (onnx.load(FILE), onnx.load(FILE_OF_ALL)) == (drawing_graph(), drawing_of_all()), again


@pytest.mark.makes
@pytest.mark.parametrize("file", [FILE, FILE_OF_ALL], ids=["best", "all"])
def test_all_that_follows_from_the_vocabulary_is_known_beforehand(file: Path, tmp_path: Path) -> None:
    """What the host computed in a run would be lost where a GPU replays it."""
    import onnx  # a serving host has it not

    from qrlora_deploy.runtime.generation.machines import _know

    options = onnxruntime.SessionOptions()
    _know(151936, options)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(file, options)
    operators = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert "CumSum" in operators
    # These compute on the host, or copy sizes to a GPU while they run.
    assert not operators & {"Shape", "Range", "Squeeze", "Concat", "Neg", "Split", "GatherND", "NonZero"}


@pytest.mark.parametrize("seed", [0, 1, 12345678901234567, 2**64 - 1])
def test_shares_are_those_of_numpys_generator(seed: int) -> None:
    for step in (0, 1, 77, 2**40):
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
        assert uniform(seed, step) == generator.random()
