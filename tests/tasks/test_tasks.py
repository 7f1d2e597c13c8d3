"""Labels and metrics: what is a class and what a number, and scores against hand and library values."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.names import label_names
from qrlora_deploy.tasks.registry import Guess, guess_task
from qrlora_deploy.tasks.regression import Regression

CLASSIFICATION, REGRESSION = Classification(), Regression()

LIBRARY = {"rtol": 0.0, "atol": 1e-12}
"""The same fp64 formula evaluated once more: a few units in the last place."""


def examples(*labels: str) -> Examples:
    return Examples(["text"] * len(labels), None, list(labels), "some.tsv")


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["0", "1", "1"], CLASSIFICATION),
        (["-1", "+1"], CLASSIFICATION),
        (["0.0", "1"], REGRESSION),
        (["1e3", "-2.5"], REGRESSION),
        (["1e-5", "2e-5"], REGRESSION),
        (["1e1", "2e1"], CLASSIFICATION),
        (["1_1", "1_2", "2_1"], CLASSIFICATION),
        (["1.5_0", "2.5"], CLASSIFICATION),
        (["\u0661.\u0665", "\u0662.\u0665"], CLASSIFICATION),
        (["\uff11.\uff15", "2.5"], CLASSIFICATION),
        (["1.5", "good"], CLASSIFICATION),
        (["nan", "inf"], CLASSIFICATION),
        (["NA", "EU", "US"], CLASSIFICATION),
        (["travel", "home"], CLASSIFICATION),
        (["1.2.3", "1.2.4"], CLASSIFICATION),
    ],
)
def test_a_decimal_point_makes_a_regression(labels: list[str], task: Task) -> None:
    assert guess_task(examples(*labels)).task == task


@pytest.mark.parametrize("label", ["nan", "NaN", "NA", "N/A", "<NA>", "-", "None", "null", "inf", "-Infinity", "1e999"])
@pytest.mark.parametrize("numbers", [("1.5", "2.5"), ("0", "1")])
def test_one_label_that_is_missing_among_numbers_is_refused_with_its_row(label: str, numbers: tuple[str, str]) -> None:
    labels = examples(*numbers, label, *numbers)
    with pytest.raises(InputError, match=r"some.tsv: row 3 has the label .* where the others are numbers"):
        guess_task(labels)
    assert guess_task(labels, "classification").task == CLASSIFICATION
    with pytest.raises(InputError, match=r"some.tsv: row 3 has the label"):
        REGRESSION.encode(labels, ("score",))


def test_a_decimal_comma_is_refused_with_its_row() -> None:
    for labels in (("1.5", "3,5"), ("2,5", "3,5")):
        with pytest.raises(InputError, match="row . has the label '.,5', a number with a comma; write a point, or say"):
            guess_task(examples(*labels))


def test_a_task_that_was_named_is_no_guess() -> None:
    versions = examples("3.11", "3.12")
    assert guess_task(versions) == Guess(
        REGRESSION, "some.tsv: row 1 has the label '3.11'; task='classification' takes numbers as names"
    )
    assert guess_task(versions, "classification") == Guess(CLASSIFICATION)
    assert guess_task(examples("0", "1"), "regression") == Guess(REGRESSION)


def test_one_class_in_several_spellings() -> None:
    assert CLASSIFICATION.encode(examples("1.0", "2", "2."), ("1", "2")) == [0, 1, 1]
    assert CLASSIFICATION.encode(examples("1", "2.0"), ("1.0", "2.0")) == [0, 1]
    assert CLASSIFICATION.encode(examples("true", "False"), ("False", "True")) == [1, 0]
    # A spelling that is a class of its own stays one.
    assert CLASSIFICATION.encode(examples("1.0", "1"), ("1", "1.0")) == [1, 0]
    with pytest.raises(InputError, match="unknown label '1.5'"):
        CLASSIFICATION.encode(examples("1.5"), ("1", "2"))


def test_names_that_transformers_gave_are_meant_by_their_numbers() -> None:
    assert CLASSIFICATION.encode(examples("1", "0", "LABEL_1"), ("LABEL_0", "LABEL_1")) == [1, 0, 1]
    with pytest.raises(InputError, match="unknown label '2'; the head knows 'LABEL_0', 'LABEL_1'"):
        CLASSIFICATION.encode(examples("2"), ("LABEL_0", "LABEL_1"))
    with pytest.raises(InputError, match="unknown label '0'"):
        CLASSIFICATION.encode(examples("0"), ("LABEL_0", "other"))


def test_names_are_ordered_by_value_or_by_the_alphabet() -> None:
    assert label_names(["10", "9", "2", "9"]) == ("2", "9", "10")
    assert label_names(["b", "10", "a", "9"]) == ("10", "9", "a", "b")
    long = "9" * 5000
    assert label_names([long, "10", "010"]) == ("010", "10", long)


def test_encoding_gives_the_position_among_the_names() -> None:
    assert CLASSIFICATION.encode(examples("c", "a", "c"), ("c", "b", "a")) == [0, 2, 0]
    assert REGRESSION.encode(examples("0.5", "-2", "1e1"), ("score",)) == [0.5, -2.0, 10.0]


def test_every_unknown_label_is_named_in_one_line() -> None:
    with pytest.raises(InputError) as caught:
        CLASSIFICATION.encode(examples("a", "y", "x", "y"), ("a", "b"))
    message = "some.tsv: row 2 has the label 'y'; unknown labels 'x', 'y'; the head knows 'a', 'b'"
    assert str(caught.value) == message


def test_a_long_list_of_unknown_labels_is_cut() -> None:
    with pytest.raises(InputError, match="'a0', 'a1', 'a10', 'a2', 'a3', 'a4', 'a5', 'a6' and 3 more"):
        CLASSIFICATION.encode(examples(*(f"a{index}" for index in range(11))), ("b",))


def test_a_regression_refuses_what_is_no_finite_number() -> None:
    with pytest.raises(InputError) as caught:
        REGRESSION.encode(examples("1", "nan", "high", "inf"), ("score",))
    message = "some.tsv: row 2 has the label 'nan'; a regression needs numbers as labels, not 'high', 'inf', 'nan'"
    assert str(caught.value) == message


def test_classification_by_hand() -> None:
    # Chosen 0 0 1 1, expected 0 1 1 1. Class 0: precision 1/2, recall 1, F1 2/3. Class 1: precision
    # 1, recall 2/3, F1 4/5. Matthews: (1 * 2 - 0 * 1) / sqrt(1 * 3 * 2 * 2).
    logits = np.array([[2.0, 1.0], [5.0, -5.0], [0.0, 0.1], [-1.0, 3.0]])
    found = CLASSIFICATION.score(logits, np.array([0, 1, 1, 1]))
    expected = {"accuracy": 0.75, "f1": (2 / 3 + 4 / 5) / 2, "matthews": 2 / math.sqrt(12)}
    assert found == pytest.approx(expected, rel=0, abs=1e-12)


def test_regression_by_hand() -> None:
    # Deviations -1 0 1 and -1 1 0: the products sum to 1, both squares to 2.
    found = REGRESSION.score(np.array([[1.0], [2.0], [3.0]]), np.array([0.0, 2.0, 1.0]))
    assert found == pytest.approx({"pearson": 0.5, "spearman": 0.5}, rel=0, abs=1e-12)


def test_scores_agree_with_the_libraries() -> None:
    random = np.random.default_rng(0)
    targets, logits = random.integers(0, 5, 200), random.standard_normal((200, 5)).astype(np.float32)
    chosen, found = logits.argmax(1), CLASSIFICATION.score(logits, targets)
    np.testing.assert_allclose(found["accuracy"], np.mean(chosen == targets), **LIBRARY)
    np.testing.assert_allclose(found["f1"], metrics.f1_score(targets, chosen, average="macro"), **LIBRARY)
    np.testing.assert_allclose(found["matthews"], metrics.matthews_corrcoef(targets, chosen), **LIBRARY)
    values = random.standard_normal(200)
    predicted = (values + random.standard_normal(200))[:, None]
    found = REGRESSION.score(predicted, values)
    np.testing.assert_allclose(found["pearson"], np.corrcoef(predicted[:, 0], values)[0, 1], **LIBRARY)
    ranks = [stats.rankdata(side) for side in (predicted[:, 0], values)]
    np.testing.assert_allclose(found["spearman"], np.corrcoef(*ranks)[0, 1], **LIBRARY)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize(
    ("task", "logits", "targets"),
    [
        (REGRESSION, [[1.0], [1.0]], [0.0, 1.0]),
        (REGRESSION, [[1.0], [2.0]], [3.0, 3.0]),
        (REGRESSION, [[1.0]], [3.0]),
        (CLASSIFICATION, [[1.0, 0.0], [1.0, 0.0]], [0, 0]),
        (CLASSIFICATION, [[1.0, 0.0], [1.0, 0.0]], [1, 1]),
    ],
)
def test_scores_that_are_not_defined_are_finite(task: Task, logits: list[list[float]], targets: list[float]) -> None:
    found = task.score(np.array(logits), np.array(targets))
    assert tuple(found) == task.metrics
    assert all(math.isfinite(value) for value in found.values())
    # Answers that are all alike, and labels that are.
    assert task.says_nothing(found)


def test_answers_that_follow_the_labels_are_correlated() -> None:
    assert not CLASSIFICATION.says_nothing(CLASSIFICATION.score(np.eye(2)[[0, 1, 1]], np.array([0, 1, 0])))
    assert not REGRESSION.says_nothing(REGRESSION.score(np.array([[1.0], [2.0]]), np.array([2.0, 1.0])))
    assert not CLASSIFICATION.says_nothing({})
