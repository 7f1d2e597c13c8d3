"""Whether a model works the whole way from factorizing to serving; what is known of its family is in `families`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qrlora_deploy.errors import InputError
from qrlora_deploy.models.capacity import padding_reach
from qrlora_deploy.models.families import BLOCK, of_type

ENCODER_DECODER = (
    "it is an encoder with a decoder, which reads its answer at the last <eos> of each text and wants as many of them "
    "in every row; a graph cannot check that"
)

REGRESSION = "regression"
"""`problem_type` of a config."""


@dataclass(frozen=True)
class LeftOut:
    """What `factorize` does not adapt unless it is told to.

    Attributes:
        names: of layers or parameters.
        reason: why.
    """

    names: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        kinds = dict.fromkeys(BLOCK.split(f".{name}")[-1] for name in self.names)
        return f"{', '.join(kinds)} ({len(self.names)}): {self.reason}"


def check_supported(name: str, model: Any) -> None:
    """Make sure that models of this family work the whole way.

    Raises:
        InputError: they do not; the message names the checkpoint and the reason.
    """
    reason = why_unsupported(model)
    if reason is not None:
        raise InputError(f"{name} ({model.config.model_type}) is not supported, since it cannot be exported: {reason}")


def check_head(name: str, problem: str | None, outputs: int) -> None:
    """Make sure that a task head for numbers has one for each text.

    Raises:
        InputError: it has several.
    """
    if problem == REGRESSION and outputs != 1:
        raise InputError(f"{name} predicts {outputs} numbers; one is supported")


def why_unsupported(model: Any) -> str | None:
    """Why a model does not work the whole way, in words for a message; None where nothing is known against it.

    Args:
        model: with or without weights, with its task head or without.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return ENCODER_DECODER
    experts = [name for name, parameter in model.named_parameters() if _is_expert(name, parameter)]
    if experts:
        return f"it is a mixture of experts ({experts[0]}, ...), whose tokens go to weights that the text chooses"
    family = of_type(getattr(config, "model_type", None))
    return family.refused or None if family is not None else None


def _is_expert(name: str, parameter: nn.Parameter) -> bool:
    return ".experts." in f".{name}" or (parameter.dim() == 3 and ("expert" in name or "moe" in name))


def shared_layers(model: Any, names: Sequence[str]) -> LeftOut | None:
    """Those of the layers `names` that the rows of a switchable graph cannot have customers of their own in."""
    family = of_type(getattr(getattr(model, "config", None), "model_type", None))
    known = family.shared if family is not None else None
    if known is None:
        return None
    ends = set(known.names(model.config))
    found = tuple(name for name in names if name.rsplit(".", 1)[-1] in ends)
    return LeftOut(found, f"they {known.reason}, so a switchable graph cannot take them") if found else None


def check_padding(name: str, model: nn.Module, tokenizer: Any) -> None:
    """Make sure that batches can be padded: the tokenizer needs a padding token, and a decoder its number.

    A decoder answers at the last token of a text, and looks for it by the number in its config. An encoder whose
    tokens see a window answers at the first token, which must have text within it.

    Raises:
        InputError: a token is missing, they differ, or the side is wrong; the message names the places.
    """
    config: Any = model.config
    token, known = tokenizer.pad_token_id, getattr(config, "pad_token_id", None)
    answers_last = any(getattr(module, "is_causal", False) for module in model.modules())
    if token is None or (answers_last and known is None):
        number = "its number" if token is None else str(token)
        raise InputError(
            f"{name} has no padding token, so texts of different lengths make no batch: set pad_token in "
            f"tokenizer_config.json (its eos_token will do) and pad_token_id in config.json, to {number}"
        )
    if answers_last and known != token:
        raise InputError(
            f"{name}: its tokenizer pads with token {token}, but pad_token_id in config.json is {known}, so it would "
            f"answer at padding; set both to the same token"
        )
    reach = padding_reach(model)
    averages = getattr(config, "classifier_pooling", "") == "mean"
    if reach is not None and not averages and tokenizer.padding_side == "left":
        raise InputError(
            f"{name} pads on the left, but answers at the first token of a row, which sees {reach} tokens: behind more "
            f"padding than that it sees no text; set padding_side in tokenizer_config.json to right"
        )
