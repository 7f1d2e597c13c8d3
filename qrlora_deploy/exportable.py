"""What cannot become a graph, told before anything is traced."""

from typing import Any

from torch import nn

from qrlora_deploy.errors import InputError


def why_not_exportable(model: nn.Module) -> str | None:
    """Why no graph can be made of `model`, in words for a message; None where nothing speaks against it.

    Args:
        model: with or without weights; only its config and the shapes of its parameters are looked at.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return (
            "it is an encoder with a decoder, which reads its answer at the last <eos> of each text and wants as many "
            "of them in every row; a graph cannot check that"
        )
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]
    if experts:
        return f"it is a mixture of experts ({experts[0]}, ...), whose tokens go to weights that the text chooses"
    return None


def check_padding(name: str, model: nn.Module, tokenizer: Any) -> None:
    """Make sure that batches can be padded: the tokenizer needs a padding token, and a decoder its number.

    A decoder answers at the last token of a text, and looks for it by the number in its config.

    Raises:
        InputError: one is missing, or they differ; the message names both places.
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
