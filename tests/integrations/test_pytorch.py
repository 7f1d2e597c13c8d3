"""Customers in a model that the caller loaded, and coefficients for the caller's own loop, against dense weights."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import qrlora_deploy as qr
from qrlora_deploy.errors import BasisMismatchError, InputError, MismatchError, QrloraError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from tests.tolerances import FP32_SIDE_BRANCH, GRADIENT_OF_FP32

TOKENS = torch.tensor([[5, 9, 2, 7, 11, 3], [8, 4, 6, 1, 0, 0]])
INPUTS = {"input_ids": TOKENS, "attention_mask": (TOKENS != 0).long()}
TARGETS = torch.tensor([2, 1])


@pytest.fixture
def model(tiny_base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(tiny_base).eval()


@pytest.fixture
def own_head(tiny_customer: Coefficients) -> Coefficients:
    """The customer with an output layer of its own for three labels."""
    random = np.random.default_rng(3)
    head = {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in head.items()}
    return replace(tiny_customer, head=arrays, labels=("a", "b", "c"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def dense(model: Any, basis: Basis, values: torch.Tensor) -> Any:
    """A copy of a plain model in fp64 whose weights are `W + Q diag(c) R`, differentiable in `values [total_rank]`."""
    model = copy.deepcopy(model).double()
    start = 0
    for target in basis.targets:
        layer = model.get_submodule(target.name)
        c = values[start : start + target.rank]
        start += target.rank
        update = torch.tensor(target.q).double() @ torch.diag(c) @ torch.tensor(target.r).double()
        weight = layer.weight.detach() + update
        del layer.weight
        layer.weight = weight
    return model


def state(model: Any) -> tuple[Any, ...]:
    """What must be as before: modules, weights, what can be trained, labels."""
    parameters = [
        (name, item.requires_grad, tuple(item.shape), float(item.detach().double().sum()))
        for name, item in model.named_parameters()
    ]
    kinds = [(name, type(module).__name__) for name, module in model.named_modules()]
    config = model.config
    return parameters, kinds, config.id2label, config.label2id, config.problem_type, model.num_labels


def test_a_customer_answers_as_dense_weights_do(model: Any, tiny_basis: Basis, tiny_customer: Coefficients) -> None:
    expected = logits(dense(model, tiny_basis, torch.tensor(tiny_customer.values).double()))
    before = logits(model)
    assert qr.load_customer(model, tiny_basis, tiny_customer) is model
    torch.testing.assert_close(logits(model).double(), expected, **FP32_SIDE_BRANCH)
    assert (logits(model) - before).abs().max() > 0.01


def test_files_are_taken_by_their_path(model: Any, tiny_basis_file: Path, tiny_customer_file: Path) -> None:
    qr.load_customer(model, tiny_basis_file, str(tiny_customer_file))
    assert qr.coefficients_of(model).digest == qr.Coefficients.load(tiny_customer_file).digest


def test_a_removed_customer_leaves_nothing(model: Any, tiny_basis: Basis, own_head: Coefficients) -> None:
    model.bert.embeddings.requires_grad_(False)
    before, answers = state(model), logits(model)
    qr.load_customer(model, tiny_basis, own_head)
    assert model(**INPUTS).logits.shape == (2, 3)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert state(model) != before
    assert qr.remove_customer(model) is model
    assert state(model) == before
    assert torch.equal(logits(model), answers)
    qr.remove_customer(model)
    assert state(model) == before


def test_customers_follow_each_other(
    model: Any, tiny_basis: Basis, tiny_customer: Coefficients, own_head: Coefficients
) -> None:
    other = replace(tiny_customer, values=tiny_customer.values[::-1].copy())
    before = state(model)
    alone = {}
    for name, customer in {"first": tiny_customer, "headed": own_head, "other": other}.items():
        fresh = copy.deepcopy(model)
        alone[name] = logits(qr.load_customer(fresh, tiny_basis, customer))
    order = {"first": tiny_customer, "headed": own_head, "other": other}
    for name in ("first", "headed", "headed", "other", "first", "headed"):
        assert torch.equal(logits(qr.load_customer(model, tiny_basis, order[name])), alone[name]), name
    assert state(qr.remove_customer(model)) == before


def test_a_head_comes_back_in_the_dtype_that_the_model_has_by_then(
    model: Any, tiny_basis: Basis, own_head: Coefficients
) -> None:
    qr.load_customer(model, tiny_basis, own_head)
    model.double()
    qr.remove_customer(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert logits(model).shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_takes_its_customers(
    dtype: torch.dtype, model: Any, tiny_basis: Basis, tiny_customer: Coefficients
) -> None:
    exact = logits(dense(model, tiny_basis, torch.tensor(tiny_customer.values).double()))
    qr.load_customer(model.to(dtype), tiny_basis, tiny_customer)
    bound = {torch.float16: 0.01, torch.bfloat16: 0.05, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(logits(model).double(), exact, rtol=0, atol=bound)


def test_a_model_with_other_weights_is_refused_and_stays_as_it_is(
    model: Any, tiny_basis: Basis, tiny_customer: Coefficients
) -> None:
    changed = model.bert.encoder.layer[1].attention.self.value.weight
    with torch.no_grad():
        changed[0, :] += 0.05
    before = state(model)
    for call in (
        lambda: qr.load_customer(model, tiny_basis, tiny_customer),
        lambda: qr.attach(model, tiny_basis),
    ):
        with pytest.raises(BasisMismatchError, match=r"1 of 4 targets differ .*layer\.1\.attention\.self\.value"):
            call()
        assert state(model) == before


def test_a_customer_of_another_basis_is_refused(model: Any, tiny_base: Path, tiny_basis: Basis) -> None:
    other = qr.factorize(tiny_base, targets="key")
    customer = Coefficients(
        np.ones(other.total_rank, np.float32), other.digest, "", "", "text-classification", ("travel",)
    )
    with pytest.raises(BasisMismatchError, match="were trained on basis"):
        qr.load_customer(model, tiny_basis, customer)
    qr.attach(model, tiny_basis)
    with pytest.raises(BasisMismatchError, match="take them out by remove_customer first"):
        qr.load_customer(model, other, customer)
    with pytest.raises(InputError, match="has side branches already"):
        qr.attach(model, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("a", "b", "c", "d")}, "labels are not the 4 of the model"),
        ({"labels": ("a", "b"), "head": {"classifier.weight": np.ones((3, 32), np.float32)}}, "2 labels, and a head"),
        ({"labels": ("a",), "head": {"score.weight": np.ones((1, 32), np.float32)}}, "no tensor score.weight"),
        ({"labels": ("a",), "head": {"classifier.weight": np.ones((1, 8), np.float32)}}, "the customer's .1, 8."),
    ],
)
def test_a_head_that_does_not_fit_is_refused_before_anything_changes(
    change: dict[str, Any], message: str, model: Any, tiny_basis: Basis, tiny_customer: Coefficients
) -> None:
    before = state(model)
    with pytest.raises(MismatchError, match=message):
        qr.load_customer(model, tiny_basis, replace(tiny_customer, **change))
    assert state(model) == before


@pytest.mark.parametrize("start", ["zero", "customer"])
def test_gradients_of_a_bare_loop_are_those_of_dense_weights_in_fp64(
    start: str, model: Any, tiny_basis: Basis, tiny_customer: Coefficients
) -> None:
    model.double()
    values = torch.tensor(tiny_customer.values if start == "customer" else 0 * tiny_customer.values).double()
    reference = dense(model, tiny_basis, values.requires_grad_())
    reference(**INPUTS, labels=TARGETS).loss.backward()

    qr.attach(model, tiny_basis)
    if start == "customer":
        qr.load_customer(model, tiny_basis, tiny_customer)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert list(trained) == [f"{name}.u" for name in tiny_basis.names]
    model(**INPUTS, labels=TARGETS).loss.backward()
    found = torch.cat([parameter.grad for parameter in trained.values()]).double()
    # c = scale * u, so the chain rule multiplies by the scale, which is 1 / ||R_i|| but for one factor for all.
    norms = torch.cat([torch.tensor(target.r).double().norm(dim=1) for target in tiny_basis.targets])
    scale = norms.log().mean().exp() / norms
    torch.testing.assert_close(found, values.grad * scale, **GRADIENT_OF_FP32)
    assert found.abs().min() > 1e-6


def test_a_bare_loop_steps_as_dense_coefficients_do(model: Any, tiny_basis: Basis, tiny_base: Path) -> None:
    """Plain gradient descent on `u` is descent on `c` with the squared scale as its rate."""
    norms = torch.cat([torch.tensor(target.r).double().norm(dim=1) for target in tiny_basis.targets])
    scale = norms.log().mean().exp() / norms
    values, rate = torch.zeros(tiny_basis.total_rank, dtype=torch.float64), 0.1
    for _ in range(3):
        leaf = values.clone().requires_grad_()
        dense(model, tiny_basis, leaf)(**INPUTS, labels=TARGETS).loss.backward()
        values = values - rate * scale**2 * leaf.grad

    model = qr.attach(model.double(), tiny_basis)
    optimizer = torch.optim.SGD([item for item in model.parameters() if item.requires_grad], lr=rate)
    for _ in range(3):
        optimizer.zero_grad()
        model(**INPUTS, labels=TARGETS).loss.backward()
        optimizer.step()
    customer = qr.coefficients_of(model, training={"by": "hand"})
    np.testing.assert_allclose(customer.values, values.numpy(), rtol=1e-5, atol=1e-8)
    assert (customer.labels, customer.base_name) == (("travel", "banking", "home", "kitchen"), str(tiny_base))
    assert customer.training == {"by": "hand"}


def test_what_the_trainer_learns_is_a_customer_like_any_other(
    model: Any, tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    qr.attach(model, tiny_basis)
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(TOKENS, TARGETS, strict=True)] * 4
    arguments = TrainingArguments(tmp_path / "run", max_steps=3, learning_rate=0.1, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    customer = qr.coefficients_of(model)
    customer.save(tmp_path / "mine.safetensors")
    fresh = AutoModelForSequenceClassification.from_pretrained(tiny_base).eval()
    qr.load_customer(fresh, tiny_basis, tmp_path / "mine.safetensors")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-6)
    assert np.abs(customer.values).max() > 0.01
    qr.merge(tiny_base, tiny_basis, customer, tmp_path / "merged")


def test_a_head_that_is_trained_travels_with_the_customer(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    options = {"num_labels": 3, "ignore_mismatched_sizes": True, "id2label": {0: "a", 1: "b", 2: "c"}}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, **options).eval()
    qr.attach(model, tiny_basis, head="output")
    trained = [item for item in model.parameters() if item.requires_grad]
    assert sum(item.numel() for item in trained) == tiny_basis.total_rank + 3 * 32 + 3
    optimizer = torch.optim.Adam(trained, lr=0.1)
    model(**INPUTS, labels=TARGETS).loss.backward()
    optimizer.step()
    customer = qr.coefficients_of(model)
    assert {name: array.shape for name, array in customer.head.items()} == {
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }
    assert customer.labels == ("a", "b", "c")
    fresh = AutoModelForSequenceClassification.from_pretrained(tiny_base).eval()
    torch.testing.assert_close(
        logits(qr.load_customer(fresh, tiny_basis, customer)), logits(model), rtol=1e-5, atol=1e-6
    )
    qr.merge(tiny_base, tiny_basis, customer, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_what_no_customer_holds_is_refused(model: Any, tiny_basis: Basis) -> None:
    with pytest.raises(InputError, match="the model has no side branches"):
        qr.coefficients_of(model)
    with pytest.raises(InputError, match="head must be frozen or output"):
        qr.attach(model, tiny_basis, head="all")
    qr.attach(model, tiny_basis)
    model.classifier.requires_grad_(True)
    with pytest.raises(InputError, match=r"2 other parameters can be trained too, such as classifier\.weight"):
        qr.coefficients_of(model)
    model.classifier.requires_grad_(False)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.u[0] = float("nan")
    with pytest.raises(QrloraError, match="diverged"):
        qr.coefficients_of(model)


def test_the_base_is_found_by_its_name_or_given(model: Any, tiny_basis: Basis, tiny_base: Path, tmp_path: Path) -> None:
    qr.attach(model, tiny_basis)
    digest = qr.coefficients_of(model).base_digest
    model.name_or_path = ""
    with pytest.raises(InputError, match="base: the model's config names none"):
        qr.coefficients_of(model)
    assert qr.coefficients_of(model, base=tiny_base).base_digest == digest
    with pytest.raises(InputError, match="no config.json"):
        qr.coefficients_of(model, base=tmp_path)


def test_a_wrapped_model_is_seen_through(model: Any, tiny_basis: Basis, tiny_customer: Coefficients) -> None:
    qr.load_customer(model, tiny_basis, tiny_customer)
    wrapped = torch.nn.DataParallel(model)
    assert qr.coefficients_of(wrapped).digest == tiny_customer.digest
    qr.remove_customer(wrapped)
    assert not any(name.endswith(".u") for name, _ in model.named_parameters())


def test_a_copy_of_a_model_has_a_customer_of_its_own(
    model: Any, tiny_basis: Basis, tiny_customer: Coefficients
) -> None:
    qr.load_customer(model, tiny_basis, tiny_customer)
    other = copy.deepcopy(model)
    qr.load_customer(other, tiny_basis, replace(tiny_customer, values=-tiny_customer.values))
    assert qr.coefficients_of(model).digest == tiny_customer.digest
    np.testing.assert_array_equal(qr.coefficients_of(other).values, -tiny_customer.values)
