"""The side branch: the formula against fp64, zero coefficients, what is trained, and what is never built."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.factorization.decomposition import factorize_weight
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.models.adapter import (
    QRLoRALinear,
    attach,
    detach,
    get_coefficients,
    precondition,
    set_coefficients,
)
from qrlora_deploy.models.targets import choose_targets, is_conv1d
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from tests.rank_rules.ranks import rank_of
from tests.tolerances import EXACT, FP32_SIDE_BRANCH

TOKENS = torch.tensor([[5, 9, 2, 7, 11, 3], [8, 4, 6, 1, 0, 0]])
INPUTS = {"input_ids": TOKENS, "attention_mask": (TOKENS != 0).long()}

SCALE: dict[str, float] = {"rtol": 1e-6, "atol": 1e-6}
"""`c = scale * u` with `u = c / scale`, in fp32: two roundings; a geometric mean is a sum of logarithms."""


def build_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "bert":
        config = BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        model: Any = BertForSequenceClassification(config)
    else:
        config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, pad_token_id=0)
        model = GPT2ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def weight_of(layer: Any) -> np.ndarray:
    weight = layer.weight.detach().double().numpy()
    return weight.T if is_conv1d(layer) else weight


def target_of(layer: Any, name: str = "layer", rule: RankRule | None = None) -> BasisTarget:
    result = factorize_weight(weight_of(layer))
    rank = rank_of(rule or EnergyShare(0.5), result.diagonal)
    parts = (result.q[:, :rank], result.r[:rank], result.diagonal)
    return BasisTarget(name, *(part.astype(np.float32) for part in parts), "0" * 64)


def basis_of(model: Any, patterns: tuple[str, ...] = (), rule: RankRule | None = None) -> Basis:
    names = choose_targets(model, patterns)
    targets = tuple(target_of(model.get_submodule(name), name, rule) for name in names)
    return Basis(targets, "base", rule or EnergyShare(), {})


def values_for(basis: Basis) -> np.ndarray:
    return np.random.default_rng(4).uniform(0.5, 1.5, basis.total_rank).astype(np.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.fixture(params=["bert", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return build_model(request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_forward_is_the_formula_in_fp64(layer: str, bias: bool) -> None:
    torch.manual_seed(1)
    base: Any = nn.Linear(6, 9, bias=bias) if layer == "linear" else Conv1D(9, 6)
    nn.init.normal_(base.weight)
    if bias:
        nn.init.normal_(base.bias)
    w = weight_of(base)
    target = target_of(base)
    adapter = QRLoRALinear(base, target)
    c = np.random.default_rng(1).normal(0, 2, target.rank).astype(np.float32)
    set_coefficients({target.name: adapter}, Basis((target,), "", EnergyShare(), {}), c)
    x = torch.randn(2, 5, 6)
    b = 0.0 if base.bias is None else base.bias.detach().double().numpy()
    delta = target.q.astype(np.float64) @ np.diag(c.astype(np.float64)) @ target.r.astype(np.float64)
    assert np.abs(delta).max() > 0.1
    expected = x.double().numpy() @ (w + delta).T + b
    np.testing.assert_allclose(adapter(x).detach().numpy(), expected, **FP32_SIDE_BRANCH)


def test_zero_coefficients_are_the_base_to_the_bit(model: Any) -> None:
    before = logits(model)
    basis = basis_of(model)
    adapters = attach(model, basis)
    assert torch.equal(logits(model), before)
    precondition(adapters)
    assert torch.equal(logits(model), before)
    set_coefficients(adapters, basis, values_for(basis))
    moved = logits(model)
    assert (moved - before).abs().max() > 0.01
    set_coefficients(adapters, basis, np.zeros(basis.total_rank, np.float32))
    assert torch.equal(logits(model), before)
    set_coefficients(adapters, basis, values_for(basis))
    assert torch.equal(logits(model), moved), "A, B and A again gives A"


def test_side_branches_equal_the_updated_weights(model: Any) -> None:
    basis = basis_of(model)
    values = values_for(basis) * 0.3
    set_coefficients(attach(model, basis), basis, values)
    with_branches = logits(model)
    detach(model)
    for target, c in zip(basis.targets, basis.split(values).values(), strict=True):
        layer = model.get_submodule(target.name)
        delta = torch.tensor((target.q.astype(np.float64) * c) @ target.r.astype(np.float64)).float()
        with torch.no_grad():
            layer.weight.add_(delta.T if is_conv1d(layer) else delta)
    np.testing.assert_allclose(with_branches.numpy(), logits(model).numpy(), **FP32_SIDE_BRANCH)


def test_detach_gives_back_the_very_modules(model: Any) -> None:
    before, output = dict(model.named_modules()), logits(model)
    basis = basis_of(model, rule=FixedRank(3))
    adapters = attach(model, basis)
    assert list(adapters) == basis.names and len(dict(model.named_modules())) > len(before)
    set_coefficients(adapters, basis, values_for(basis))
    detach(model)
    after = dict(model.named_modules())
    assert after.keys() == before.keys() and all(after[name] is module for name, module in before.items())
    assert torch.equal(logits(model), output)


def test_the_state_has_the_coefficients_and_nothing_else_new(model: Any) -> None:
    before = set(model.state_dict())
    adapters = attach(model, basis_of(model))
    added = {name for name in model.state_dict() if name.replace(".base.", ".") not in before}
    assert len(added) == len(adapters) and all(name.endswith(".u") for name in added)


def test_only_u_is_trained(model: Any) -> None:
    basis = basis_of(model)
    adapters = attach(model, basis)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.u" for name in basis.names}
    model(**INPUTS, labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    gradients = torch.cat([adapter.u.grad for adapter in adapters.values()])  # type: ignore[misc]
    assert gradients.isfinite().all() and (gradients != 0).float().mean() > 0.9


def test_gradient_is_that_of_the_formula() -> None:
    """`dL/dc_i = (q_i . g) (r_i . x)` summed over the rows, against fp64."""
    base = nn.Linear(6, 9)
    target = target_of(base)
    adapter = QRLoRALinear(base, target)
    x, g = torch.randn(4, 6), torch.randn(4, 9)
    adapter(x).backward(g)
    expected = ((g.double().numpy() @ target.q) * (x.double().numpy() @ target.r.T)).sum(0)
    np.testing.assert_allclose(adapter.u.grad.numpy(), expected, **FP32_SIDE_BRANCH)  # type: ignore[union-attr]


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that operations return and that are no views of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.made.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_the_update_is_never_built(layer: str) -> None:
    out, width = 17, 23
    base: Any = nn.Linear(width, out) if layer == "linear" else Conv1D(out, width)
    target = target_of(base)
    adapter = QRLoRALinear(base, target)
    adapter.requires_grad_(False).u.requires_grad_(True)
    with Shapes() as shapes:
        adapter(torch.randn(3, 5, width)).square().sum().backward()
        adapter.c + 0
    assert {(out, width), (width, out)}.isdisjoint(shapes.made), "an update of the size of the weight was built"
    assert (target.rank,) in shapes.made and len(shapes.made) > 3, "the recorder saw the branch"
    with Shapes() as shapes:
        (adapter.q * adapter.c) @ adapter.r
    assert (out, width) in shapes.made, "the recorder would see an update"


def test_values_go_in_and_come_out(model: Any) -> None:
    basis = basis_of(model)
    adapters = attach(model, basis)
    values = values_for(basis)
    set_coefficients(adapters, basis, values)
    np.testing.assert_allclose(get_coefficients(adapters), values, **EXACT)
    precondition(adapters)
    assert not get_coefficients(adapters).any()
    set_coefficients(adapters, basis, values)
    np.testing.assert_allclose(get_coefficients(adapters), values, **SCALE)
    with pytest.raises(InputError, match="do not fit the basis"):
        set_coefficients(adapters, basis, values[1:])


def test_preconditioning_evens_the_rows_out(model: Any) -> None:
    basis = basis_of(model)
    adapters = attach(model, basis)
    precondition(adapters)
    scales = torch.cat([adapter.scale for adapter in adapters.values()]).double()
    np.testing.assert_allclose(float(scales.log().mean().exp()), 1.0, **SCALE)
    norms = np.concatenate([np.linalg.norm(target.r, axis=1) for target in basis.targets])
    moved = norms * scales.numpy()
    np.testing.assert_allclose(moved / moved[0], np.ones_like(moved), rtol=1e-5, atol=0)
    assert scales.max() / scales.min() > 1.5


def test_preconditioning_a_zero_row_stays_finite() -> None:
    zero = np.zeros((3, 2), np.float32)
    r = np.array([[1, 2, 3], [0, 0, 0]], np.float32)
    adapter = QRLoRALinear(nn.Linear(3, 3), BasisTarget("a", zero, r, np.zeros(3, np.float32), ""))
    precondition({"a": adapter})
    assert adapter.scale.isfinite().all()
    adapter.r.zero_()
    precondition({"a": adapter})
    np.testing.assert_allclose(adapter.scale.numpy(), [1, 1], **SCALE)


def test_the_prefix_of_the_model_may_be_missing_or_too_much() -> None:
    model = build_model("bert")
    basis = basis_of(model, ("query",))
    encoder = model.bert
    assert list(attach(encoder, basis)) == basis.names
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, QRLoRALinear)
    detach(model)
    targets = (BasisTarget(**vars(target) | {"name": target.name.removeprefix("bert.")}) for target in basis.targets)
    bare = Basis(tuple(targets), "base", EnergyShare(), {})
    assert list(attach(model, bare)) == bare.names


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("bert.encoder.layer.7.attention.self.query", InputError, "has no layer bert.encoder.layer.7"),
        ("bert.embeddings.word_embeddings", InputError, "is a Embedding; only nn.Linear and Conv1D"),
        ("bert.encoder.layer.0.intermediate.dense", BasisMismatchError, r"\[24, 16\] in the model but \[16, 16\]"),
    ],
)
def test_a_model_that_does_not_fit_stays_as_it_is(name: str, error: type[Exception], message: str) -> None:
    model = build_model("bert")
    basis = basis_of(model, ("query",))
    wrong = BasisTarget(**vars(basis.targets[1]) | {"name": name})
    before = dict(model.named_modules())
    with pytest.raises(error, match=message):
        attach(model, Basis((basis.targets[0], wrong), "base", EnergyShare(), {}))
    assert dict(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
