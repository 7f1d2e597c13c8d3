"""A classifier and its tokenizer in a folder, small enough to build in a second.

Also used by the smoke run, which is why it stands outside conftest.py.
"""

import string
from pathlib import Path

SENTENCES = (
    "book a flight from boston to denver for tomorrow morning",
    "what is the balance of my savings account",
    "set an alarm for seven and play some music",
    "how long do i cook the rice",
    "please transfer money to my sister",
    "is it going to rain in paris this weekend",
)
LABELS = ("travel", "banking", "home", "kitchen")


def save_base(folder: Path, labels: tuple[str, ...] = LABELS, tokens: int = 64) -> Path:
    """Write a seeded, random 2-layer, 32-wide BERT classifier of so many tokens in safetensors; returns `folder`."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = build_tokenizer(tokens)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=tokens,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
        with torch.no_grad():
            # The default spread of 0.02 gives logits near zero, where every comparison passes.
            for name, parameter in model.named_parameters():
                offset = 1.0 if name.endswith("LayerNorm.weight") else 0.0
                parameter.copy_(offset + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_word_pieces():  # type: ignore[no-untyped-def]
    """A WordPiece tokenizer of `tokenizers` over the words of `SENTENCES`; other words fall apart into letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return tokenizer


def build_tokenizer(tokens: int = 64):  # type: ignore[no-untyped-def]
    """`build_word_pieces` as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=build_word_pieces(),
        model_max_length=tokens,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
