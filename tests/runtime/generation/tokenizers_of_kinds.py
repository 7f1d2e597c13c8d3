"""Small tokenizers of the kinds that decoders have, trained on a few lines."""

import functools

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = (
    "the quick brown fox jumps over the lazy dog. don't stop, it's fine!",
    "Grüße aus Köln, voilà; 3.14 and 1,000 — “quoted” text.",
    "naïve café déjà vu\n\tindented   spaces\r\nnew line",
    "東京は日本の首都です。 Привет, мир! 🎉👩‍👩‍👧 family emoji",
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


@functools.cache
def byte_level() -> Tokenizer:
    """As Llama 3, Qwen and SmolLM have: any token may end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral and Gemma have: a mark for spaces, and bytes for characters that are no token."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = sorted({word for text in TEXTS[:2] for word in text.split()})
    letters = sorted({letter for text in TEXTS[:2] for letter in text if not letter.isspace()} | {"▁"})
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *letters])}
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 2):
            left, right = f"▁{word}"[: end - 1], f"▁{word}"[end - 1 : end]
            if right and left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", *SPECIAL)])
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    """As sentencepiece's unigram models have."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}
