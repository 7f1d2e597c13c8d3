"""Several labels a row: targets, loss, metrics, answers and agreement against hand, library and PyTorch values."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
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
