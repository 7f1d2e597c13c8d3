"""How many tokens fit: one answer, which the model itself agrees with."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from qrlora_deploy.errors import InputError
from qrlora_deploy.models.capacity import UNKNOWN_MAX_TOKENS, max_tokens
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.training.loop import load_tokenizer
from tests.tiny import build_tokenizer

SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: BertForSequenceClassification(BertConfig(**SHAPE, max_position_embeddings=20)), 20),
        (lambda: RobertaForSequenceClassification(RobertaConfig(**SHAPE, max_position_embeddings=20)), 18),
        (
            lambda: RobertaForSequenceClassification(
                RobertaConfig(**SHAPE, max_position_embeddings=20, pad_token_id=5)
            ),
            14,
        ),
        (lambda: MPNetForSequenceClassification(MPNetConfig(**SHAPE, max_position_embeddings=20)), 18),
    ],
)
def test_as_many_tokens_as_the_model_itself_can_run(made, expected: int) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = made(), build_tokenizer()
    tokenizer.model_max_length = int(1e30)
    assert max_tokens(model, tokenizer) == expected
    model(input_ids=torch.full((1, expected), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, expected + 1), 7))
    tokenizer.model_max_length = 9
    assert max_tokens(model, tokenizer) == 9


def test_a_model_without_positions_of_its_own_has_the_tokenizers_limit() -> None:
    model, tokenizer = torch.nn.Module(), build_tokenizer()
    model.config = type("Config", (), {})()
    assert max_tokens(model, tokenizer) == 64
    tokenizer.model_max_length = int(1e30)
    assert max_tokens(model, tokenizer) == UNKNOWN_MAX_TOKENS


def test_training_knows_positions_behind_the_padding_index(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path)
    config = RobertaConfig(**SHAPE, vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    model = checkpoint.load_model()
    with pytest.raises(InputError, match="max_length=33 is more than the 32 tokens"):
        load_tokenizer(checkpoint, model, 33)
    load_tokenizer(checkpoint, model, 32)
