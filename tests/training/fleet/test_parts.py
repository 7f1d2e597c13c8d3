"""The parts of a fleet, each against what it stands for: torch's AdamW, the Trainer's order, scikit-learn's metrics."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from sklearn import metrics
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModelForSequenceClassification, BertConfig, get_linear_schedule_with_warmup

from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.multi_label import MultiLabel
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.training.fleet.adam import AdamTable
from qrlora_deploy.training.fleet.branch import RowHead, RowValues
from qrlora_deploy.training.fleet.engine import _places
from qrlora_deploy.training.fleet.pool import RowPool
from qrlora_deploy.training.fleet.schedule import Schedule
from qrlora_deploy.training.fleet.scoring import Answers, score_answers
from qrlora_deploy.training.fleet.shipping import in_one_copy, ship
from qrlora_deploy.training.fleet.targets import TargetTable
from qrlora_deploy.training.fleet.tokens import TokenRows
from tests.tolerances import FP32_SIDE_BRANCH, Tolerance
from tests.training.fleet.making import settings_of

CPU = torch.device("cpu")
ADAM: Tolerance = {"rtol": 1e-6, "atol": 1e-7}
"""AdamW in fp32 with the same operations; the bias corrections are computed in fp64 here."""


def test_each_row_has_an_adamw_of_its_own() -> None:
    random = torch.Generator().manual_seed(0)
    table, start = AdamTable((3, 4), CPU), torch.randn(3, 4, generator=random)
    table.enter(torch.arange(3), start)
    rates = torch.tensor([0.1, 0.02, 0.3])
    singles = [start[row].clone().requires_grad_(True) for row in range(3)]
    optimizers = [
        torch.optim.AdamW([value], lr=float(rate), weight_decay=0.0) for value, rate in zip(singles, rates, strict=True)
    ]
    for step in range(1, 8):
        gradient = torch.randn(3, 4, generator=random)
        table.value.grad = gradient.clone()
        # The last row waits in the first three steps.
        late = torch.tensor([step, step, max(1, step - 3)], dtype=torch.float32)
        now = rates * torch.tensor([1.0, 1.0, float(step > 3)])
        table.step(now, late)
        for row, (value, optimizer) in enumerate(zip(singles, optimizers, strict=True)):
            if row < 2 or step > 3:
                value.grad = gradient[row]
                optimizer.step()
        if step == 3:
            table.enter(torch.tensor([2]), start[2:])
        assert not table.value.grad.any()
    torch.testing.assert_close(table.value.detach(), torch.stack([value.detach() for value in singles]), **ADAM)
    table.keep(torch.tensor([1]))
    torch.testing.assert_close(table.best, torch.stack([start[0], singles[1].detach(), start[2]]), **ADAM)


def test_a_new_customer_finds_nothing_of_the_one_before() -> None:
    table = AdamTable((2, 3), CPU)
    table.value.grad = torch.full((2, 3), torch.nan)
    table.step(torch.ones(2), torch.ones(2))
    table.enter(torch.tensor([1]), torch.zeros(1, 3))
    assert not table.value[1].any() and not table.first[1].any() and not table.second[1].any()
    table.value.grad = torch.ones(2, 3)
    table.step(torch.tensor([0.0, 0.5]), torch.ones(2))
    torch.testing.assert_close(table.value[1].detach(), torch.full((3,), -0.5), **ADAM)


def test_order_and_rates_are_the_trainers() -> None:
    settings, counts = settings_of(epochs=20, batch_size=4, seed=3), (9, 4, 1)
    schedule = Schedule(4, settings)
    expected: list[list[list[int]]] = []
    for slot, count in enumerate(counts):
        schedule.enter(slot, count)
        torch.manual_seed(settings.seed)
        data = list(range(count))
        loader = DataLoader(data, batch_size=4, sampler=RandomSampler(data), collate_fn=list)  # type: ignore[arg-type]
        prepared = prepare_data_loader(loader, use_seedable_sampler=True, put_on_device=False)
        batches = []
        for epoch in range(settings.epochs):
            prepared.set_epoch(epoch)
            batches += [list(batch) for batch in prepared]
        expected.append(batches)
    steps = [len(batches) for batches in expected]
    curves = []
    for total in steps:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        curve = get_linear_schedule_with_warmup(optimizer, int(0.06 * total), total)
        curves.append([optimizer.param_groups[0]["lr"], *_walk(optimizer, curve, total)])
    for step in range(max(steps)):
        rows, rates = schedule.next_rows(), schedule.rates()
        for slot, total in enumerate(steps):
            if step < total:
                own = rows.slots == slot
                assert rows.rows[own].tolist() == expected[slot][step]
                np.testing.assert_allclose(rows.shares[own], 1 / own.sum(), rtol=0.0, atol=0.0)
                np.testing.assert_allclose(rates[slot], curves[slot][step], rtol=1e-12, atol=0.0)
        assert rates[3] == 0.0
        ended = schedule.advance()
        over = [slot for slot in ended if schedule.step[slot] == steps[slot]]
        for slot in over:
            schedule.leave(slot)
        schedule.next_epoch([slot for slot in ended if slot not in over])
    assert schedule.free.tolist() == [0, 1, 2, 3]


def _walk(optimizer: torch.optim.Optimizer, curve: object, total: int) -> list[float]:
    rates = []
    for _ in range(total):
        optimizer.step()
        curve.step()  # type: ignore[attr-defined]
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.filterwarnings("ignore:A single label was found", "ignore:y_pred contains classes not in y_true")
def test_metrics_of_many_are_those_of_each() -> None:
    random = np.random.default_rng(0)
    counts = (1, 2, 7, 40, 3)
    owners = random.permutation(np.repeat(np.arange(5), counts))
    targets, chosen = random.integers(0, 6, len(owners)), random.integers(0, 6, len(owners))
    targets[owners == 4] = chosen[owners == 4] = 2
    found = Classification().score_each(owners, chosen[:, None], targets.astype(np.float64), 5)
    for customer, scores in enumerate(found):
        own = owners == customer
        alone = Classification().score(np.eye(6)[chosen[own]], targets[own])
        assert scores.keys() == alone.keys()
        np.testing.assert_allclose(list(scores.values()), list(alone.values()), rtol=1e-12, atol=1e-12)


def test_metrics_of_many_multi_label_customers_are_those_of_each() -> None:
    random = np.random.default_rng(1)
    counts, labels = (1, 2, 9, 40, 3), (2, 5, 1, 4, 3)
    owners = random.permutation(np.repeat(np.arange(5), counts))
    logits = random.normal(size=(len(owners), 5)).astype(np.float32)
    targets = (random.random(logits.shape) < 0.4).astype(np.float64)
    targets[owners == 4] = 0.0  # nothing applies and, below, nothing is answered: no division by 0
    absent = np.arange(5) >= np.array(labels)[owners][:, None]
    logits[owners == 4] -= 10.0
    logits[absent], targets[absent] = -np.inf, 0.0
    found = MultiLabel().score_each(owners, logits.astype(np.float64), targets, 5)
    for customer, scores in enumerate(found):
        own, count = owners == customer, labels[customer]
        chosen, expected = logits[own, :count] >= 0, targets[own, :count] > 0.5
        for name, average in (("f1_micro", "micro"), ("f1_macro", "macro")):
            # As binary decisions where there is one label: scikit-learn takes a table of one column for classes.
            alone = (
                metrics.f1_score(expected[:, 0], chosen[:, 0], zero_division=0)
                if count == 1
                else metrics.f1_score(expected, chosen, average=average, zero_division=0)
            )
            np.testing.assert_allclose(scores[name], alone, rtol=1e-12, atol=1e-12)
        whole = metrics.accuracy_score(expected, chosen)
        np.testing.assert_allclose(scores["accuracy"], whole, rtol=1e-12, atol=1e-12)


def test_labels_that_a_customer_has_not_take_no_part_in_its_loss() -> None:
    random = torch.Generator().manual_seed(0)
    counts = torch.tensor([5, 2, 3, 1])
    values = torch.randn(4, 5, generator=random)
    targets = (torch.rand(4, 5, generator=random) < 0.5).double()
    absent = torch.arange(5) >= counts[:, None]
    targets[absent] = 0.0
    given = values.clone().requires_grad_(True)
    losses = MultiLabel().row_losses(given + torch.zeros(4, 5).masked_fill(absent, -torch.inf), targets)
    losses.sum().backward()
    alone = values.clone().requires_grad_(True)
    expected = torch.stack(
        [
            torch.nn.functional.binary_cross_entropy_with_logits(row[:count], target[:count].float())
            for row, target, count in zip(alone, targets, counts.tolist(), strict=True)
        ]
    )
    expected.sum().backward()
    assert given.grad is not None and alone.grad is not None
    torch.testing.assert_close(losses, expected, **FP32_SIDE_BRANCH)
    torch.testing.assert_close(given.grad, alone.grad, **FP32_SIDE_BRANCH)


@pytest.mark.parametrize("task", [Classification(), Regression(), MultiLabel()])
def test_a_loss_is_the_mean_of_its_rows(task: Task) -> None:
    random = torch.Generator().manual_seed(0)
    labels = 1 if task.is_number else 3
    logits = torch.randn(6, labels, generator=random)
    targets = {
        "text-classification": torch.tensor([0, 2, 1, 1, 0, 2]),
        "text-regression": torch.randn(6, generator=random),
        "text-multi-label": (torch.rand(6, 3, generator=random) < 0.5).float(),
    }[task.name]
    config = BertConfig(num_labels=labels, problem_type=task.problem_type, vocab_size=5, hidden_size=8)
    config.update({"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.classifier = _Given(logits)
    expected = model(input_ids=torch.ones(6, 2, dtype=torch.int64), labels=targets).loss
    torch.testing.assert_close(task.loss(logits, targets), expected, **FP32_SIDE_BRANCH)
    # A fleet keeps targets of every task in fp64.
    torch.testing.assert_close(task.row_losses(logits, targets.double()).mean(), expected, **FP32_SIDE_BRANCH)


class _Given(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_answers_of_all_kinds_are_scored_and_unsound_ones_left_out() -> None:
    def answers(task: Task, slots: list[int], decisive: object, targets: object, finite: list[bool]) -> Answers:
        parts = (np.array(part) for part in (slots, decisive, targets, finite))
        return Answers(task, *parts)

    found = score_answers(
        [
            answers(Regression(), [5, 5, 5], [[0.1], [0.7], [0.9]], [1.0, 2.0, 3.0], [True] * 3),
            answers(
                Classification(),
                [2, 7, 2, 9],
                [[1.0], [3.0], [0.0], [1.0]],
                [1.0, 3.0, 1.0, 1.0],
                [True, False, True, True],
            ),
            answers(MultiLabel(), [3, 3], [[1.0, -1.0], [2.0, -2.0]], [[1.0, 0.0], [1.0, 1.0]], [True] * 2),
            answers(MultiLabel(), [4], [[1.0, -1.0]], [[1.0, 0.0]], [False]),
        ]
    )
    assert found.keys() == {2, 3, 5, 9} and found[2]["accuracy"] == 0.5 and found[9]["accuracy"] == 1.0
    assert found[5]["spearman"] == pytest.approx(1.0, rel=0, abs=1e-12)
    assert found[3]["accuracy"] == 0.5 and found[3]["f1_micro"] == pytest.approx(0.8, rel=0, abs=1e-12)


def test_targets_of_any_width_lie_beside_each_other() -> None:
    table = TargetTable(4)
    table.enter([0, 2], [[3, 1, 2], [[0.0, 1.0], [1.0, 1.0]]])
    assert table.of(np.array([0, 0]), np.array([2, 0])).tolist() == [[2.0], [3.0]]
    assert table.of(np.array([2, 0]), np.array([1, 1])).tolist() == [[1.0, 1.0], [1.0, 0.0]]
    table.leave(0)
    table.enter([1, 0], [[0.5], [[1.0, 0.0, 1.0]]])
    assert table.of(np.array([2, 1, 0]), np.array([0, 0, 0])).tolist() == [[0, 1, 0], [0.5, 0, 0], [1, 0, 1]]


def pool_of(left: bool = False, slots: int = 3) -> RowPool:
    return RowPool(slots, {"input_ids": 9, "token_type_ids": 0}, left, CPU, 10**6)


def rows_of(*texts: list[int]) -> TokenRows:
    ids = np.concatenate([np.array(text, dtype=np.int32) for text in texts])
    lengths = np.array([len(text) for text in texts])
    return TokenRows({"input_ids": ids, "token_type_ids": np.ones_like(ids)}, lengths)


def shown(pool: RowPool, owners: list[int], rows: list[int]) -> tuple[list[list[int]], torch.Tensor | None]:
    slots, numbers = np.array(owners), np.array(rows)
    lengths = pool.lengths[slots, numbers]
    starts = torch.from_numpy(pool.starts(slots, numbers))
    there, length = torch.from_numpy(lengths), int(lengths.max())
    hidden = None if pool.hidden is None else pool.padded_hidden(starts, there, length)
    return pool.pad_rows(starts, there, length)["input_ids"].tolist(), hidden


def test_rows_one_after_another_lie_as_the_upper_blocks_expect() -> None:
    pool = pool_of()
    pool.add(0, rows_of([1, 2, 3], [4]))
    pool.add(2, rows_of([5, 6]))
    # Ascending lengths.
    starts, lengths = pool.starts(np.array([0, 2, 0]), np.array([1, 0, 0])), np.array([1, 2, 3])
    where, there = torch.from_numpy(starts), torch.from_numpy(lengths)
    pool.fill(where, there, pool.pad_rows(where, there, 3)["input_ids"][:, :, None].float())
    packed = pool.pack(starts, lengths)
    assert pool.packed_hidden(packed).flatten().tolist() == [4, 5, 6, 1, 2, 3]
    assert packed.token_rows.tolist() == [0, 1, 1, 2, 2, 2]
    assert packed.layout.first.tolist() == [0, 1, 3]


@pytest.mark.parametrize("left", [False, True])
def test_a_pool_keeps_rows_when_customers_come_and_go(left: bool) -> None:
    pool = pool_of(left)
    pool.add(0, rows_of([1, 2, 3], [4]))
    pool.add(1, rows_of([5, 6]))
    assert shown(pool, [0, 1, 0], [0, 0, 1])[0] == (
        [[1, 2, 3], [9, 5, 6], [9, 9, 4]] if left else [[1, 2, 3], [5, 6, 9], [4, 9, 9]]
    )
    for slot, row, length in ((0, 0, 3), (0, 1, 1), (1, 0, 2)):
        starts = torch.from_numpy(pool.starts(np.array([slot]), np.array([row])))
        ids = torch.tensor(shown(pool, [slot], [row])[0], dtype=torch.float32)
        pool.fill(starts, torch.tensor([length]), ids[:, :, None] * torch.ones(2))
    pool.remove(0)
    for number in range(20):
        pool.add(2 - 2 * (number % 2), rows_of([7, 8, 7, number]))
        ids, hidden = shown(pool, [1, 2 - 2 * (number % 2)], [0, 0])
        assert ids == ([[9, 9, 5, 6], [7, 8, 7, number]] if left else [[5, 6, 9, 9], [7, 8, 7, number]])
        assert hidden is not None and hidden.shape == (2, 4, 2)
        assert hidden[0][-2:].tolist() == [[5, 5], [6, 6]] if left else hidden[0][:2].tolist() == [[5, 5], [6, 6]]
        pool.remove(2 - 2 * (number % 2))
    assert len(pool.tokens["input_ids"]) <= 12 and pool.size_bytes <= 13 * 2 * 4


def test_room_is_counted_by_living_customers() -> None:
    pool = RowPool(2, {"input_ids": 0}, False, CPU, limit_bytes=100)
    pool.add(0, TokenRows({"input_ids": np.ones(8, dtype=np.int32)}, np.array([8])))
    assert pool.has_room(2, 10) and not pool.has_room(3, 10)
    pool.remove(0)
    assert pool.has_room(10, 10)


@pytest.mark.parametrize("shape", [(7, 5), (7, 3, 5)])
def test_each_row_has_its_own_output_layer(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    values = RowValues()
    values.slots = torch.tensor([2, 0, 2, 3, 0, 2, 3])
    places = _places(values.slots.numpy())
    assert places.tolist() == [0, 0, 1, 0, 1, 2, 1]
    values.places, values.places_end = torch.from_numpy(places), 3
    values.head_weight = torch.randn(4, 2, 5, generator=random)
    values.head_bias = torch.randn(4, 2, generator=random)
    x = torch.randn(shape, generator=random)
    expected = torch.stack(
        [
            torch.nn.functional.linear(row, values.head_weight[slot], values.head_bias[slot])
            for row, slot in zip(x, values.slots, strict=True)
        ]
    )
    torch.testing.assert_close(RowHead(values)(x), expected, **FP32_SIDE_BRANCH)


@dataclass(frozen=True)
class Parcel:
    name: str
    numbers: tuple[torch.Tensor, ...]
    inner: "Parcel | None"


def test_a_record_travels_in_one_copy() -> None:
    mask = torch.tensor([[True, False, True]])
    strided = torch.arange(6, dtype=torch.float64).view(2, 3).T
    record = Parcel("a", (mask, strided), Parcel("b", (torch.tensor([], dtype=torch.int64), torch.tensor(7.5)), None))
    sizes: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        sizes.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    moved = in_one_copy(record, allocate, CPU)
    assert sizes == [16 + 48 + 0 + 16]
    assert moved.name == "a" and moved.inner is not None and moved.inner.inner is None
    for one, two in zip((*record.numbers, *record.inner.numbers), (*moved.numbers, *moved.inner.numbers), strict=True):  # type: ignore[union-attr]
        assert one.dtype == two.dtype and two.is_contiguous()
        torch.testing.assert_close(one, two, rtol=0.0, atol=0.0)
    assert ship(record, CPU) is record
