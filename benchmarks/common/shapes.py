"""Random encoders of known shapes, for benchmarks of speed: their numbers do not matter, their sizes do."""

from typing import Any

import torch
import transformers

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "minilm": ("Bert", {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    # Room for the two positions that these leave to padding; base sizes are the configurations' own.
    "mpnet": ("MPNet", {"max_position_embeddings": 514}),
    "roberta": ("Roberta", {"max_position_embeddings": 514, "type_vocab_size": 1}),
}
"""Family and sizes by name."""


def random_classifier(family: str, options: dict[str, Any]) -> Any:
    """A sequence classifier of `family` with random weights, always the same, fp32."""
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForSequenceClassification")(config)
