"""Choosing layers: the default, names, expressions, the last blocks, and what is said when nothing fits."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qrlora_deploy.errors import InputError
from qrlora_deploy.models.targets import choose_targets, is_adaptable, is_conv1d

SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
DISTIL = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16}
GPT2 = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}

# Architecture -> options of its config, path of its blocks, linear layers of a block.
ENCODERS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "Bert": (
        SMALL,
        "bert.encoder.layer",
        ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        + ["intermediate.dense", "output.dense"],
    ),
    "Roberta": (
        SMALL,
        "roberta.encoder.layer",
        ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        + ["intermediate.dense", "output.dense"],
    ),
    "MPNet": (
        SMALL,
        "mpnet.encoder.layer",
        ["attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"]
        + ["intermediate.dense", "output.dense"],
    ),
    "DistilBert": (
        DISTIL,
        "distilbert.transformer.layer",
        ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"],
    ),
    "DebertaV2": (
        SMALL,
        "deberta.encoder.layer",
        ["attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"]
        + ["attention.output.dense", "intermediate.dense", "output.dense"],
    ),
    "GPT2": (GPT2, "transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
}


def build(name: str) -> Any:
    """A classifier on the meta device: no memory, no random numbers."""
    config = getattr(transformers, f"{name}Config")(**ENCODERS[name][0])
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForSequenceClassification")(config)


@pytest.fixture(scope="module")
def bert() -> Any:
    return build("Bert")


@pytest.mark.parametrize("name", ENCODERS)
def test_default_is_every_linear_layer_of_every_block(name: str) -> None:
    _, blocks, layers = ENCODERS[name]
    model = build(name)
    expected = [f"{blocks}.{index}.{layer}" for index in (0, 1) for layer in layers]
    found = choose_targets(model)
    assert sorted(found) == sorted(expected)
    assert found == [path for path, _ in model.named_modules() if path in set(expected)], "in the order of the model"
    assert choose_targets(model, last_layers=1) == [path for path in found if f"{blocks}.1." in path]
    assert choose_targets(model, layers[:1]) == [f"{blocks}.{index}.{layers[0]}" for index in (0, 1)]


@pytest.mark.parametrize("name", ENCODERS)
def test_a_headless_encoder_has_the_same_layers(name: str) -> None:
    model = build(name)
    inner = choose_targets(model.base_model)
    assert [f"{model.base_model_prefix}.{path}" for path in inner] == choose_targets(model)


@pytest.mark.parametrize(
    ("patterns", "last_layers", "expected"),
    [
        (["query"], None, ["0.attention.self.query", "1.attention.self.query"]),
        (["value", "query"], 1, ["1.attention.self.query", "1.attention.self.value"]),
        (["attention.output.dense"], 1, ["1.attention.output.dense"]),
        (["output.dense"], 1, ["1.attention.output.dense", "1.output.dense"]),
        ([r".*\.0\..*(query|key)"], None, ["0.attention.self.query", "0.attention.self.key"]),
        (["bert.encoder.layer.1.output.dense"], None, ["1.output.dense"]),
        (["query", ".*query"], 1, ["1.attention.self.query"]),
        (["query"], 2, ["0.attention.self.query", "1.attention.self.query"]),
    ],
)
def test_names_and_expressions(bert: Any, patterns: list[str], last_layers: int | None, expected: list[str]) -> None:
    assert choose_targets(bert, patterns, last_layers) == [f"bert.encoder.layer.{name}" for name in expected]


def test_a_layer_outside_the_blocks_is_chosen_by_name_alone(bert: Any) -> None:
    assert choose_targets(bert, ["classifier", "pooler.dense"]) == ["bert.pooler.dense", "classifier"]
    with pytest.raises(InputError, match="none of the chosen layers is in the last 1 blocks"):
        choose_targets(bert, ["classifier"], last_layers=1)


@pytest.mark.parametrize(
    ("patterns", "last_layers", "message"),
    [
        (["q_proj", "query", "uery"], None, "no layer is called q_proj, uery; there are attention.output.dense, "),
        (["q_proj"], None, "attention.self.query"),
        (["("], None, r"targets '\(' is not a regular expression"),
        (["query"], 0, "last_layers must be between 1 and 2, not 0"),
        ([], 3, "last_layers must be between 1 and 2, not 3"),
        (["embeddings"], None, "no layer is called embeddings"),
        (["LayerNorm"], None, "no layer is called LayerNorm"),
        ([""], None, "no layer is called"),
    ],
)
def test_errors_are_one_line_with_the_choices(
    bert: Any, patterns: list[str], last_layers: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        choose_targets(bert, patterns, last_layers)
    assert "\n" not in str(caught.value)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="no plain linear layers in numbered blocks"):
        choose_targets(nn.Sequential(nn.ReLU()))


def test_only_plain_layers_are_adapted() -> None:
    class Special(nn.Linear):
        """A layer that may compute something else."""

    gpt2 = build("GPT2")
    assert is_conv1d(gpt2.transformer.h[0].attn.c_attn) and is_adaptable(gpt2.transformer.h[0].attn.c_attn)
    assert is_adaptable(nn.Linear(1, 1)) and not is_conv1d(nn.Linear(1, 1))
    assert not is_adaptable(Special(1, 1)) and not is_adaptable(nn.Embedding(1, 1))


@pytest.mark.parametrize(
    ("family", "sizes", "own"),
    [
        ("MPNet", {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}, "q"),
        ("DistilBert", {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 8}, "q_lin"),
    ],
)
def test_projections_have_one_name_for_all_families(family: str, sizes: dict[str, int], own: str) -> None:
    config = getattr(transformers, f"{family}Config")(vocab_size=10, **sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(config)
    found = choose_targets(model, ["query"])
    assert found == choose_targets(model, [own]) and len(found) == 2
    with pytest.raises(InputError, match="no layer is called qery"):
        choose_targets(model, ["qery"])
