"""One score a pair: targets, loss, metrics, answers and agreement against hand, library and PyTorch values."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.base import Answer
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.multi_label import MultiLabel
from qrlora_deploy.tasks.registry import guess_task, task_of_config
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.tasks.reranking import Reranking

TASK = Reranking()


def examples(*labels: str) -> Examples:
    return Examples(["query"] * len(labels), ["passage"] * len(labels), list(labels), "some.tsv")


def test_the_option_alone_makes_a_reranker() -> None:
    assert guess_task(examples("0", "1")).task == Classification()
    assert guess_task(examples("0.5", "1")).task == Regression()
    assert guess_task(examples("0", "1"), "reranker").task == TASK


def test_a_config_is_a_rerankers_where_it_says_so_and_names_no_other_problem() -> None:
    assert task_of_config(None, 1) == Regression()
    assert task_of_config(None, 1, named=TASK.name) == TASK
    assert task_of_config("regression", 1, named=TASK.name) == Regression()
    assert task_of_config(None, 2, named=TASK.name) == Classification()
    assert task_of_config("multi_label_classification", 1, named=TASK.name) == MultiLabel()
    assert task_of_config(None, 1, named="of another program") == Regression()


def test_targets_are_numbers_from_0_to_1() -> None:
    assert TASK.encode(examples("0", "1", "0.25", "1.0"), ("score",)) == [0.0, 1.0, 0.25, 1.0]
    message = (
        "some.tsv: row 2 has the label '2'; a reranker needs numbers from 0 to 1 as labels, not '2', 'yes'; "
        "task='regression' takes others"
    )
    with pytest.raises(InputError) as caught:
        TASK.encode(examples("0", "2", "yes"), ("score",))
    assert str(caught.value) == message
    assert TASK.unknown(examples("0", "2", "yes"), ("score",)) == ["2", "yes"]
    with pytest.raises(InputError, match="some.tsv holds single texts; task='reranker' needs pairs"):
        TASK.encode(Examples(["text"], None, ["1"], "some.tsv"), ("score",))


def test_a_new_head_starts_at_the_mean_of_the_labels() -> None:
    head = TASK.new_head(examples("0", "0", "0", "1"))
    assert head.labels == ("score",) and 1 / (1 + math.exp(-head.bias)) == pytest.approx(0.25)
    assert TASK.new_head(examples(*["0"] * 999, "0.1")).bias == -4.0
    with pytest.raises(InputError, match="every row has the label 1; a reranker needs pairs that answer each other"):
        TASK.new_head(examples("1", "1"))


def test_loss_is_binary_cross_entropy() -> None:
    logits, targets = torch.tensor([[2.0], [-1.0], [0.3]]), torch.tensor([1.0, 0.0, 0.4])
    shares = 1 / (1 + np.exp(-logits[:, 0].double().numpy()))
    expected = -np.mean(targets.numpy() * np.log(shares) + (1 - targets.numpy()) * np.log(1 - shares))
    assert TASK.loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)


def test_scores_by_hand_and_by_the_libraries() -> None:
    # In order of the scores: relevant, not, relevant. Precision at the relevant ones: 1/1 and 2/3.
    found = TASK.score(np.array([[3.0], [-1.0], [1.0]]), np.array([1.0, 0.5, 0.0]))
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2) and found["accuracy"] == pytest.approx(1 / 3)
    assert tuple(found) == TASK.metrics
    random = np.random.default_rng(0)
    targets = random.integers(0, 2, 200).astype(np.float64)
    logits = (targets + random.standard_normal(200) - 0.5)[:, None]
    found = TASK.score(logits, targets)
    assert found["average_precision"] == pytest.approx(metrics.average_precision_score(targets, logits[:, 0]))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(targets, 1 / (1 + np.exp(-logits[:, 0])) >= 0.5))
    assert found["spearman"] == pytest.approx(stats.spearmanr(logits[:, 0], targets).statistic)
    assert not TASK.says_nothing(found) and TASK.says_nothing(TASK.score(np.ones((3, 1)), np.array([1.0, 0.0, 1.0])))
    assert TASK.score(np.array([[1.0], [2.0]]), np.array([0.0, 0.0]))["average_precision"] == 0.0


def test_answers_and_what_labels_mean() -> None:
    assert TASK.answer(np.array([1.0], dtype=np.float32), ("score",)) == Answer(
        "score", pytest.approx(1 / (1 + math.exp(-1.0))), ("score",)
    )
    assert TASK.answer(np.array([-1.0], dtype=np.float32), ("score",)).labels == ()
    relevant = [TASK.matches(("score",), (label,), ("score",)) for label in ("1", "0.5", "0.49", "other")]
    others = [TASK.matches((), (label,), ("score",)) for label in ("1", "0.5", "0.49", "other")]
    assert relevant == [True, True, False, False] and others == [False, False, True, False]
    np.testing.assert_array_equal(TASK.agreement(np.array([[1.0], [-0.1]]), np.array([[2.0], [0.1]])), [1.0, 0.0])
