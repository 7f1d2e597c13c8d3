"""Several labels a row: targets, loss, metrics, answers and agreement against hand, library and PyTorch values."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_recall_curve
from transformers import BertConfig, BertForSequenceClassification

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.labels import Label
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.base import Answer
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.multi_label import MultiLabel
from qrlora_deploy.tasks.registry import guess_task, task_of_config
from qrlora_deploy.tasks.regression import Regression

TASK = MultiLabel()


def examples(*labels: Label) -> Examples:
    return Examples(["text"] * len(labels), None, list(labels), "some.jsonl")


def test_lists_are_recognised_and_texts_need_the_option() -> None:
    assert guess_task(examples(("a", "b"), ())).task == TASK
    assert guess_task(examples("a", ("b",))).task == TASK
    assert guess_task(examples("a|b", "b")).task == Classification()
    assert guess_task(examples("a|b", "b"), "multi-label").task == TASK
    assert guess_task(examples(("1.5",), "2.5")).task == TASK


def test_targets_by_name() -> None:
    rows = examples(("c", "a"), (), "b", " a | c |", ("1.0",))
    assert TASK.new_head(rows).labels == ("1.0", "a", "b", "c")
    assert TASK.encode(rows, ("a", "b", "c", "1")) == [
        [1.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ]


def test_unknown_labels_are_named_with_the_first_row() -> None:
    with pytest.raises(InputError) as caught:
        TASK.encode(examples(("a",), ("a", "y"), ("x",)), ("a", "b"))
    message = "some.jsonl: row 2 has the label ('a', 'y'); unknown labels 'x', 'y'; the head knows 'a', 'b'"
    assert str(caught.value) == message
    with pytest.raises(InputError, match="no row has a label"):
        TASK.new_head(examples((), ()))


@pytest.mark.parametrize("task", [Classification(), Regression()])
def test_other_tasks_refuse_lists_by_their_row(task: Classification | Regression) -> None:
    with pytest.raises(InputError, match=r"some.jsonl: row 2 has the label \('a', 'b'\)"):
        task.encode(examples("1", ("a", "b")), ("1", "2"))


def test_loss_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=20, num_labels=3, problem_type=TASK.problem_type, **sizes)
    model = BertForSequenceClassification(config).eval()
    targets = torch.tensor(TASK.encode(examples(("a", "c"), (), ("b",)), ("a", "b", "c")))
    with torch.no_grad():
        out = model(torch.randint(0, 20, (3, 5)), labels=targets)
    assert TASK.loss(out.logits, targets).item() == pytest.approx(out.loss.item(), rel=1e-6)
    assert task_of_config(config.problem_type, 3) == TASK


def test_scores_by_hand() -> None:
    # Decisions: a right, a wrong | b missed, nothing | a right and b right. Row 3 is wholly right.
    # Label a: 2 right, 1 too many, none missed: F1 = 4/5. Label b: 1 right, 1 missed: 2/3. Label c: 0 by rule.
    logits = np.array([[2.0, -1.0, -9.0], [1.0, -3.0, -0.1], [0.5, 0.1, -2.0]])
    targets = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    found = TASK.score(logits, targets)
    expected = {"f1_micro": 6 / 8, "f1_macro": (4 / 5 + 2 / 3 + 0) / 3, "accuracy": 1 / 3}
    assert found == pytest.approx(expected, rel=0, abs=1e-12) and tuple(found) == TASK.metrics
    assert TASK.right(logits, targets).tolist() == [False, False, True]
    assert not TASK.says_nothing(found) and TASK.says_nothing(TASK.score(-np.abs(logits), targets))


@pytest.mark.parametrize("labels", [1, 2, 6])
def test_scores_are_those_of_scikit_learn(labels: int) -> None:
    random = np.random.default_rng(labels)
    logits, targets = random.normal(size=(40, labels)), (random.random((40, labels)) < 0.3).astype(np.float64)
    found, chosen = TASK.score(logits, targets), logits >= 0
    # Of decisions that were laid out in a row: a table of one column would be taken for classes.
    assert found["f1_micro"] == pytest.approx(f1_score(targets.ravel() > 0.5, chosen.ravel()), rel=0, abs=1e-12)
    each = [f1_score(targets[:, label] > 0.5, chosen[:, label]) for label in range(labels)]
    assert found["f1_macro"] == pytest.approx(np.mean(each), rel=0, abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy_score(targets > 0.5, chosen), rel=0, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_thresholds_are_the_best_that_scikit_learn_finds(seed: int) -> None:
    random = np.random.default_rng(seed)
    # Few different values, so that rows tie; and a label that is nearly always wrong at 0.5.
    logits = np.round(random.normal(size=(30, 3)) * 2, seed % 3).astype(np.float32) - np.array([0, 2, -3], np.float32)
    targets = (random.random((30, 3)) < np.array([0.3, 0.6, 0.2])).astype(np.float64)
    found = TASK.best_thresholds(logits, targets)
    tuned = TASK.deciding_at(found)
    shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for label, threshold in enumerate(found):
        precision, recall, _ = precision_recall_curve(targets[:, label], shares[:, label])
        best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
        chosen = shares[:, label] >= threshold
        assert f1_score(targets[:, label], chosen) == pytest.approx(best, rel=0, abs=1e-12)
        np.testing.assert_array_equal(tuned.applies(logits)[:, label], chosen)
        plain = f1_score(targets[:, label], shares[:, label] >= 0.5)
        assert (threshold == 0.5) == (plain == pytest.approx(best, rel=0, abs=1e-12))
    names = ("a", "b", "c")
    for row, share, target in zip(logits, shares, targets, strict=True):
        expected = {name for name, one, cut in zip(names, share, found, strict=True) if one >= cut}
        assert set(tuned.answer(row, names).labels) == expected
        assert bool(tuned.right(row[None], target[None])[0]) == (expected == set(np.array(names)[target > 0.5]))
    micro = f1_score(targets.ravel(), (shares >= np.array(found)).ravel())
    assert tuned.score(logits, targets)["f1_micro"] == pytest.approx(micro, rel=0, abs=1e-12)


def test_thresholds_where_there_is_little_to_choose() -> None:
    far = np.array([[200.0, -200.0, 1.0], [-200.0, -210.0, -1.0]], dtype=np.float32)
    found = TASK.best_thresholds(far, np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
    # Right already; every row has it; no row has it.
    assert found[0] == 0.5 and 0 < found[1] < 1e-12 and found[2] == 0.5
    assert TASK.deciding_at(()) == TASK and TASK.deciding_at((0.2, 0.5)) != TASK
    # In the middle, in logits, between the rows that it parts.
    logits = np.array([[-4.0], [-2.0], [2.0]])
    assert TASK.best_thresholds(logits, np.array([[0.0], [1.0], [1.0]])) == (pytest.approx(1 / (1 + np.exp(3.0))),)
    for other in (Classification(), Regression()):
        assert other.best_thresholds(logits, logits) == () and other.deciding_at((0.1,)) == other


def test_agreement_is_that_of_decisions_at_the_thresholds() -> None:
    tuned = TASK.deciding_at((0.9, 0.5))
    first, second = np.array([[1.0, 1.0, -np.inf]]), np.array([[3.0, 1.0, -np.inf]])
    # The cut of 0.9 is 2.197 in logits; the third label is one that the customer has not.
    np.testing.assert_array_equal(tuned.agreement(first, second), [0.5])
    np.testing.assert_array_equal(TASK.agreement(first, second), [1.0])


def test_answers_name_all_labels_that_apply() -> None:
    names = ("a", "b", "c")
    assert TASK.answer(np.array([1.0, -1.0, 0.0], dtype=np.float32), names) == Answer(
        "a", pytest.approx(1 / (1 + np.exp(-1.0))), ("a", "c")
    )
    assert TASK.answer(np.array([-3.0, -1.0, -2.0], dtype=np.float32), names).labels == ()


def test_agreement_is_the_share_of_equal_decisions_of_labels_that_are_there() -> None:
    absent = -np.inf
    first = np.array([[1.0, -1.0, absent], [1.0, 1.0, 1.0]])
    second = np.array([[2.0, 1.0, absent], [1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(TASK.agreement(first, second), [0.5, 1.0])
