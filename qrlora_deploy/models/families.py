"""What is known of families of models, one entry each; a new family is one more entry of `FAMILIES`.

A family without an entry works as far as its parts are found by their kind: linear layers in numbered blocks, an
output layer with one output a label. Needs no PyTorch.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrlora_deploy.models.decoder_family import Decoder

if TYPE_CHECKING:
    import torch
    from torch import nn

Head = Callable[["torch.Tensor"], "torch.Tensor"]
"""From first tokens `[rows, width]`, or from all, to as many logits `[rows, labels]`."""

BLOCK = re.compile(r"\.(\d+)\.")
"""A numbered block in a module path with a point before it, such as `.encoder.layer.3.attention`."""


@dataclass(frozen=True)
class Attention:
    """Where a block has the layers of its attention, as paths from the block.

    Attributes:
        query: the projection of queries.
        key: of keys.
        value: of values.
        output: the layer behind the heads.
    """

    query: str
    key: str
    value: str
    output: str


@dataclass(frozen=True)
class PostNorm:
    """Where a block that normalises behind each sum (BERT's) has its other parts, as paths from the block.

    Attributes:
        attention_norm: behind the attention.
        expand: the feed-forward part's first layer.
        activation: between its layers.
        contract: its second layer.
        norm: behind it.
    """

    attention_norm: str
    expand: str
    activation: str
    contract: str
    norm: str


@dataclass(frozen=True)
class Shared:
    """Layers that do not see a batch of texts, so that its rows cannot have customers of their own in them.

    Attributes:
        names: the ends of their paths, from the config.
        reason: what they see instead.
    """

    names: Callable[[Any], Sequence[str]]
    reason: str


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Attributes:
        name: as people say it.
        model_types: of transformers, where the entry is about these alone.
        attention: where its attention is; None: nothing asks for it.
        block: the rest of its block; None: the part above a trunk cannot run without padding.
        head: gives the output layer of a model that answers texts.
        token_head: gives that of a model that answers tokens.
        refused: why models of these types do not work the whole way.
        shared: layers that a merged model may have adapted and a switchable graph may not.
        decoder: how its models that write text are built; None: there are none, or they cannot be exported.
    """

    name: str
    model_types: tuple[str, ...] = ()
    attention: Attention | None = None
    block: PostNorm | None = None
    head: Callable[[Any], Head] | None = None
    token_head: Callable[[Any], Head] | None = None
    refused: str = ""
    shared: Shared | None = None
    decoder: Decoder | None = None


def _pooled_head(model: Any) -> Head:
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:
        return lambda first: model.classifier(pooler(first[:, None]))
    return lambda first: model.classifier(first[:, None])


def _token_head(model: Any) -> Head:
    return lambda tokens: model.classifier(tokens)


def _distilbert_head(model: Any) -> Head:
    return lambda first: model.classifier(model.pre_classifier(first).relu())


def _deberta_positions(config: Any) -> Sequence[str]:
    if not getattr(config, "relative_attention", False):
        return ()
    shares = getattr(config, "share_att_key", False)
    return ("key_proj", "query_proj") if shares else ("pos_key_proj", "pos_query_proj")


PLACES = "it reads where words stand on a page, not texts alone"
POSITIONS = "see relative positions, which all texts share"

HEAD_NORMS: dict[str, Any] = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}

GEMMA: dict[str, Any] = {
    "after_attention": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "after_feed_forward": "post_feedforward_layernorm",
    "norm_offset": 1.0,
    "scaled_embedding": True,
}
"""Of the second and third one."""

FAMILIES = (
    Family(
        "BERT, RoBERTa and what has their module names",
        attention=Attention(
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
        ),
        block=PostNorm(
            "attention.output.LayerNorm",
            "intermediate.dense",
            "intermediate.intermediate_act_fn",
            "output.dense",
            "output.LayerNorm",
        ),
        head=_pooled_head,
        token_head=_token_head,
    ),
    Family(
        "MPNet",
        attention=Attention("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
        block=PostNorm(
            "attention.LayerNorm",
            "intermediate.dense",
            "intermediate.intermediate_act_fn",
            "output.dense",
            "output.LayerNorm",
        ),
        head=_pooled_head,
        token_head=_token_head,
    ),
    Family(
        "DistilBERT",
        attention=Attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        block=PostNorm("sa_layer_norm", "ffn.lin1", "ffn.activation", "ffn.lin2", "output_layer_norm"),
        head=_distilbert_head,
        token_head=_token_head,
    ),
    Family(
        "Llama and what has its module names",
        attention=Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ),
    Family("Llama, SmolLM", ("llama",), decoder=Decoder()),
    Family("Mistral", ("mistral",), decoder=Decoder(windows=True)),
    Family("Qwen2", ("qwen2",), decoder=Decoder(windows=True)),
    Family("Qwen3", ("qwen3",), decoder=Decoder(windows=True, **HEAD_NORMS)),
    Family(
        "Phi-3",
        ("phi3",),
        decoder=Decoder(attention=("self_attn.qkv_proj",), feed_forward=("mlp.gate_up_proj",), windows=True),
    ),
    Family("Gemma", ("gemma",), decoder=Decoder(norm_offset=1.0, scaled_embedding=True)),
    Family("Gemma 2", ("gemma2",), decoder=Decoder(windows=True, **GEMMA)),
    Family("Gemma 3", ("gemma3_text",), decoder=Decoder(windows=True, **GEMMA, **HEAD_NORMS)),
    Family("DeBERTa", ("deberta",), shared=Shared(lambda _config: ("pos_proj", "pos_q_proj"), POSITIONS)),
    Family("DeBERTa-v2 and -v3", ("deberta-v2",), shared=Shared(_deberta_positions, POSITIONS)),
    Family("OPT", ("opt",), shared=Shared(lambda _config: ("fc1", "fc2"), "see the tokens of all texts in one row")),
    Family(
        "FNet",
        ("fnet",),
        refused="it takes no attention mask, so its answer depends on the padding of its batch",
    ),
    Family("LayoutLM, LiLT, MarkupLM", ("layoutlm", "layoutlmv2", "layoutlmv3", "lilt", "markuplm"), refused=PLACES),
    Family("Longformer", ("longformer",), refused="it cuts texts into windows, whose number a graph cannot leave open"),
    Family("CANINE", ("canine",), refused="it reads characters by their hashes and has no embedding of tokens"),
    Family(
        "Funnel",
        ("funnel",),
        refused="it pools tokens between its blocks by sizes that a graph would fix to one batch",
    ),
    Family("TAPAS", ("tapas",), refused="it reads a table with each question, not a text"),
    Family(
        "XLNet",
        ("xlnet",),
        refused="it computes positions that a graph cannot have and keeps the texts of a batch in another axis",
    ),
    Family("X-MOD", ("xmod",), refused="it wants the language of each text beside the text"),
)


def of_type(model_type: str | None) -> Family | None:
    """The family whose entry names a `model_type` of transformers."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def of_block(block: "nn.Module") -> Family | None:
    """The family in whose places a block has all parts that `Attention` and `PostNorm` name."""
    for family in FAMILIES:
        if family.attention is not None and family.block is not None:
            paths = (*vars(family.attention).values(), *vars(family.block).values())
            if all(_has(block, path) for path in paths):
                return family
    return None


def _has(module: "nn.Module", path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
