"""Decoders and their tokenizers in folders, small enough to build in a second."""

from pathlib import Path
from typing import Any

from tests.tiny import SENTENCES

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def build_byte_pairs(template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of transformers, trained on a few sentences; it ends texts with `<|im_end|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, "system user assistant"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, eos_token="<|im_end|>", bos_token="<|endoftext|>"
    )
    fast.chat_template = template
    return fast


def save_decoder(folder: Path, kind: str = "Llama", template: str | None = CHATML, **fields: Any) -> Path:
    """Write a seeded, random decoder of 2 layers, 32 wide, in safetensors, with its tokenizer; returns `folder`.

    Args:
        folder: of the checkpoint.
        kind: of transformers' classes, such as "Llama" or "Qwen2".
        template: the tokenizer's chat template.
        fields: of the config that differ from `SIZES`.
    """
    import torch
    import transformers

    tokenizer = build_byte_pairs(template)
    sizes = SIZES | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**sizes | {"pad_token_id": None} | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            # The default spread of 0.02 gives logits near zero, where every comparison passes.
            for name, parameter in model.named_parameters():
                offset = 1.0 if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
                parameter.copy_(offset + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
