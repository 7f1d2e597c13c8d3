"""A vector a text: pooling, loss, metrics and agreement against hand and PyTorch values."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.embedding import SCALE, Embedding
from qrlora_deploy.tasks.pooling import Pooling, pool
from qrlora_deploy.tasks.registry import guess_task, task_of_config
from tests.tolerances import FP32_SIDE_BRANCH

TASK = Embedding()


def pairs(*labels: str) -> Examples:
    return Examples(["a"] * len(labels), ["b"] * len(labels), list(labels), "some.tsv")


def test_the_option_alone_makes_embeddings() -> None:
    assert guess_task(pairs("1", "0")).task == Classification()
    assert guess_task(pairs("1", "1"), "embedding").task == TASK
    assert task_of_config(None, 2, named=TASK.name) == TASK
    assert task_of_config("single_label_classification", 2, named=TASK.name) == Classification()


def test_pairs_that_belong_together_are_taken_and_others_refused_by_their_row() -> None:
    assert TASK.encode(pairs("", "1", "1.0", "true"), ()) == [1.0] * 4
    with pytest.raises(InputError, match=r"some.tsv: row 2 has the label '0'; embeddings are trained on pairs that"):
        TASK.encode(pairs("1", "0"), ())
    with pytest.raises(InputError, match="some.tsv holds single texts; task='embedding' needs pairs"):
        TASK.encode(Examples(["a"], None, [""], "some.tsv"), ())
    with pytest.raises(InputError, match="embeddings have no output layer"):
        TASK.new_head(pairs("1"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_by_hand_with_padding_on_either_side(dtype: torch.dtype) -> None:
    states = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]], [[9.0, 9.0], [2.0, 2.0], [4.0, 0.0]]], dtype=dtype)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    mean = pool(states, mask, Pooling("mean"))
    assert mean.dtype == torch.float32 and mean.tolist() == [[2.0, 2.0], [3.0, 1.0]]
    assert pool(states, mask, Pooling("first")).tolist() == [[1.0, 0.0], [2.0, 2.0]]
    unit = pool(states, mask, Pooling("mean", True))
    torch.testing.assert_close(unit, torch.tensor([[2.0, 2.0], [3.0, 1.0]]) / torch.tensor([[8.0], [10.0]]).sqrt())


def test_loss_is_the_cross_entropy_of_scaled_cosines_over_the_batch() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(8, 5, requires_grad=True)
    first, second = embeddings[:4], embeddings[4:]
    expected = torch.zeros(())
    for row in range(4):
        cosines = torch.stack([functional.cosine_similarity(first[row], second[other], dim=0) for other in range(4)])
        expected = expected - torch.log_softmax(20 * cosines, 0)[row] / 4
    found = TASK.loss(embeddings, torch.ones(4))
    assert SCALE == 20 and found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, embeddings, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, **FP32_SIDE_BRANCH)
    torch.testing.assert_close(TASK.by_row(embeddings), torch.cat([first, second], 1))


def test_scores_by_hand() -> None:
    # Second texts at 0, 90 and 45 degrees. Row 1 finds its own first; row 2, at 40, its own third; row 3, at 30, first.
    def at(*degrees: float) -> np.ndarray:
        angles = np.deg2rad(degrees)
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    found = TASK.score(np.concatenate([3 * at(0, 40, 30), at(0, 90, 45)], 1), np.ones(3))
    assert found == pytest.approx({"mrr_at_10": (1 + 1 / 3 + 1) / 3, "accuracy_at_1": 2 / 3})
    assert tuple(found) == TASK.metrics and not TASK.says_nothing(found)


def test_many_rows_are_scored_as_by_the_whole_matrix_and_vectors_that_are_alike_find_nothing() -> None:
    random = np.random.default_rng(0)
    first = random.standard_normal((1500, 6))
    second = first + random.standard_normal((1500, 6))
    cosines = (first / np.linalg.norm(first, axis=1)[:, None]) @ (second / np.linalg.norm(second, axis=1)[:, None]).T
    places = 1 + (cosines > np.diag(cosines)[:, None]).sum(1)
    found = TASK.score(np.concatenate([first, second], 1).astype(np.float64), np.ones(1500))
    assert found["accuracy_at_1"] == np.mean(places == 1)
    assert found["mrr_at_10"] == pytest.approx(np.mean(np.where(places <= 10, 1 / places, 0)))
    assert TASK.says_nothing(TASK.score(np.ones((20, 4)), np.ones(20)))


def test_agreement_is_the_cosine() -> None:
    found = TASK.agreement(
        np.array([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    )
    np.testing.assert_allclose(found, [1.0, 0.5**0.5, 0.0], rtol=0, atol=1e-12)
