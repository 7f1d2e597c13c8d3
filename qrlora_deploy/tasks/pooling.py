"""From the states of tokens to one vector a text, as sentence encoders do it."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

POOLING_FIELD = "qrlora_pooling"
"""Entry of a model's config that holds its `Pooling`."""

MEAN, FIRST = "mean", "first"

SMALLEST_NORM = 1e-12
"""A vector that is shorter is divided by this, as `torch.nn.functional.normalize` does."""


@dataclass(frozen=True)
class Pooling:
    """How a sentence encoder makes one vector of a text.

    Attributes:
        mode: "mean" over the tokens that the attention mask keeps, or "first": the first one of them (BERT's [CLS]).
        normalize: whether the vector has length 1.
    """

    mode: str = MEAN
    normalize: bool = False

    def config_fields(self) -> dict[str, Any]:
        """What a model's config says of it."""
        return {POOLING_FIELD: asdict(self)}


def pooling_of(config: Any) -> Pooling:
    """The pooling that a model's config names; the mean, of any length, where it names none."""
    found = getattr(config, POOLING_FIELD, None)
    return Pooling(**found) if isinstance(found, dict) else Pooling()


def pool(states: "torch.Tensor", mask: "torch.Tensor", pooling: Pooling) -> "torch.Tensor":
    """One vector a row.

    Args:
        states: `[batch, length, width]`.
        mask: `[batch, length]`, 0 where a token is padding, on either side.
        pooling: which one.

    Returns:
        `[batch, width]` fp32, whatever the dtype of the states.
    """
    from torch.nn import functional

    states = states.float()
    if pooling.mode == FIRST:
        first = (mask != 0).long().argmax(dim=1)
        found = states.gather(1, first[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
    else:
        kept = (mask != 0).unsqueeze(2).float()
        found = (states * kept).sum(1) / kept.sum(1).clamp(min=1.0)
    return functional.normalize(found, dim=1, eps=SMALLEST_NORM) if pooling.normalize else found
