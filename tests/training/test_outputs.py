"""Which outputs a run has: the base's where they serve, else a new set; a task that was named is no guess."""

from pathlib import Path

import pytest

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.training.outputs import Outputs, frozen_outputs, own_outputs
from qrlora_deploy.training.settings import TrainSettings, WarmupSettings, fingerprint
from tests.tiny import LABELS

CLASSIFICATION, REGRESSION = Classification(), Regression()
REPLACES = "a new head replaces the base's for 'travel', 'banking', 'home', 'kitchen'"


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_base))


def examples(*labels: str) -> Examples:
    return Examples(["text"] * len(labels), None, list(labels), "some.tsv")


def test_a_head_that_serves_is_kept(base: Checkpoint) -> None:
    assert own_outputs(base, examples("home", "travel")) == Outputs(CLASSIFICATION, LABELS, new=False)


def test_a_trained_head_is_not_replaced_without_a_word(base: Checkpoint) -> None:
    assert own_outputs(base, examples("x", "y")) == Outputs(CLASSIFICATION, ("x", "y"), True, remark=REPLACES)


def test_why_it_is_a_regression_is_said(base: Checkpoint) -> None:
    found = own_outputs(base, examples("1", "2.5"))
    assert (found.task, found.labels, found.bias) == (REGRESSION, ("score",), 1.75)
    assert found.remark == (
        f"{REPLACES}; a regression: some.tsv: row 2 has the label '2.5'; task='classification' takes numbers as names"
    )


def test_a_task_that_was_named_is_taken(base: Checkpoint) -> None:
    assert own_outputs(base, examples("3.11", "3.12"), "classification").labels == ("3.11", "3.12")
    assert own_outputs(base, examples("1", "2"), "regression").task == REGRESSION
    with pytest.raises(InputError, match="row 1 has the label 'home'; a regression needs numbers"):
        own_outputs(base, examples("home", "travel"), "regression")


def test_a_frozen_head_has_the_task_that_it_has(base: Checkpoint) -> None:
    assert frozen_outputs(base, "auto") == frozen_outputs(base, "classification")
    with pytest.raises(InputError, match="task='regression': the head of .* is for text-classification"):
        frozen_outputs(base, "regression")


def test_settings_know_the_tasks() -> None:
    with pytest.raises(InputError, match="task must be one of auto, .*classification.*, not number"):
        WarmupSettings(task="number")
    # Runs of versions without --task are resumed.
    assert "task" not in fingerprint(TrainSettings())
    assert fingerprint(TrainSettings(task="regression"))["task"] == "regression"
