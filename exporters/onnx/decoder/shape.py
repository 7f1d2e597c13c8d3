"""The sizes and settings of a decoder, from its config; what no graph of ours computes is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporters.onnx.decoder.rotary import check_rotary
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.models.decoder_family import Decoder
from qrlora_deploy.models.families import of_type

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""By transformers' names."""

HEAD_MULTIPLE = 16
"""GroupQueryAttention takes heads of such sizes alone."""


@dataclass(frozen=True)
class Shape:
    """Sizes and settings of a decoder.

    Attributes:
        hidden: width of the residual stream.
        inner: width of the feed-forward part.
        activation: of the gate, "silu" or "gelu_tanh".
        positions: tokens of the longest text.
        rotary: settings of the rotary positions of each layer.
        rotary_size: numbers of a head that are rotated.
        scale: of the scores; 0: one by the square root of the head's size.
        windows: of each layer, how many tokens it looks back on, itself included; 0: all.
        softcap: of the scores; 0: none.
        logits_softcap: of the logits; 0: none.
    """

    family: Decoder
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int
    epsilon: float
    activation: str
    tied: bool
    rotary: tuple[Mapping[str, Any], ...]
    rotary_size: int
    windows: tuple[int, ...]
    scale: float = 0.0
    softcap: float = 0.0
    logits_softcap: float = 0.0

    @property
    def queries(self) -> int:
        """Numbers of all queries of a token."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Numbers of all keys of a token, and of all values."""
        return self.kv_heads * self.head_size


def read_shape(config: Any, name: str, positions: int = 0) -> Shape:
    """From the config as transformers has it.

    Args:
        positions: tokens of the longest text; 0: as many as the config says.
        name: of the checkpoint, for messages.

    Raises:
        InputError: the family has no description, or a setting is none that a graph can have.
    """
    family = of_type(config.model_type)
    decoder = family.decoder if family else None
    if decoder is None:
        raise InputError(
            f"{name}: decoders of model type {config.model_type!r} cannot be exported this way; "
            f"{argument('format', 'genai')} traces them as transformers has them"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size % HEAD_MULTIPLE:
        raise InputError(f"{name}: its heads have {size} numbers, not a multiple of {HEAD_MULTIPLE}")
    rotary = _rotary(config)
    for settings in rotary:
        check_rotary(settings, name)
    partial = float(rotary[0].get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1.0) or 1.0)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return Shape(
        family=decoder,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=size,
        vocabulary=config.vocab_size,
        positions=positions or config.max_position_embeddings,
        epsilon=float(config.rms_norm_eps),
        activation=_activation(config, name),
        tied=bool(config.tie_word_embeddings),
        rotary=rotary,
        rotary_size=int(size * partial),
        windows=_windows(config, decoder),
        scale=float(scalar) ** -0.5 if scalar else 0.0,
        softcap=float(getattr(config, "attn_logit_softcapping", None) or 0.0),
        logits_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _activation(config: Any, name: str) -> str:
    given = getattr(config, "hidden_activation", None) or config.hidden_act
    if given not in ACTIVATIONS:
        raise InputError(f"{name}: the activation {given!r} is not supported; these are: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[given]


def _layer_types(config: Any) -> tuple[str, ...]:
    return tuple(getattr(config, "layer_types", None) or ("",) * config.num_hidden_layers)


def _windows(config: Any, decoder: Decoder) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None) or 0
    if not decoder.windows or getattr(config, "use_sliding_window", None) is False:
        window = 0
    return tuple(0 if kind == "full_attention" else window for kind in _layer_types(config))


def _rotary(config: Any) -> tuple[Mapping[str, Any], ...]:
    """The settings of each layer; transformers 5 keeps them in one place, version 4 in several."""
    found = getattr(config, "rope_parameters", None)
    kinds = _layer_types(config)
    if found is None:
        scaling = dict(getattr(config, "rope_scaling", None) or {})
        scaling.setdefault("rope_type", scaling.pop("type", "default"))
        found = {"rope_theta": config.rope_theta, **scaling}
        local = {"rope_type": "default", "rope_theta": getattr(config, "rope_local_base_freq", None)}
        if local["rope_theta"]:
            found = {"full_attention": found, "sliding_attention": local}
    if "rope_theta" in found:
        return (_whole(found, config),) * len(kinds)
    return tuple(_whole(found[kind], config) for kind in kinds)


def _whole(settings: Mapping[str, Any], config: Any) -> Mapping[str, Any]:
    """Settings with what transformers takes from the config where they lack it."""
    old = settings.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    old = old or config.max_position_embeddings
    factor = settings.get("factor") or config.max_position_embeddings / old
    return {**settings, "original_max_position_embeddings": old, "factor": factor}
