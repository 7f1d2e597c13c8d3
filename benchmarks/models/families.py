"""Small models of many families, with random weights and the settings that make each family what it is."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qrlora_deploy.data.sample import sample_texts

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SPREAD = 0.2
"""Of the weights: the usual 0.02 gives logits near zero, where every comparison passes."""

SPARE = 8
"""Rows of the embedding without a token; the tokenizers of some families add tokens when they are read."""

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
GROUPED = SMALL | ENDS | {"num_key_value_heads": 2, "max_position_embeddings": 64}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3}
PARTS = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}


@dataclass(frozen=True)
class Family:
    """A model to try.

    Attributes:
        name: as the page has it.
        kind: the name of the classes in transformers, before `Config` and before `head`.
        settings: of its config.
        head: the end of the name of the class.
        numbers: whether the data are numbers instead of labels.
        extra: entries of config.json that are written after the model was saved.
        vocabulary: whether the config has the size of the vocabulary.
        task: what `--task` calls it, where pairs of texts are the data.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    head: str = "ForSequenceClassification"
    numbers: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    vocabulary: bool = True
    task: str = "auto"

    @property
    def tags(self) -> bool:
        """Whether the data are tags of words."""
        return self.head == "ForTokenClassification"

    def save(self, folder: Path) -> None:
        """Write the model and a tokenizer.

        Raises:
            AttributeError: this transformers has no such model.
        """
        tokenizer = build_tokenizer()
        size = {"vocab_size": len(tokenizer) + SPARE} if self.vocabulary else {}
        labels = {} if "num_labels" in self.settings else {"num_labels": 3}
        config = getattr(transformers, f"{self.kind}Config")(**{**size, **labels, **self.settings})
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = getattr(transformers, f"{self.kind}{self.head}")(config).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=SPREAD)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | self.extra))


def build_tokenizer() -> Any:
    """A WordPiece tokenizer of 300 pieces, made from the texts that come with the project."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(sample_texts(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=48,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


FAMILIES = (
    Family("BERT", "Bert", SMALL),
    Family("BERT, a regression", "Bert", SMALL | {"num_labels": 1}, numbers=True),
    Family("DistilBERT", "DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    Family("RoBERTa", "Roberta", SMALL | {"pad_token_id": 0}),
    Family("XLM-RoBERTa", "XLMRoberta", SMALL | {"pad_token_id": 0}),
    Family("ELECTRA", "Electra", SMALL | {"embedding_size": 16}),
    Family("ALBERT", "Albert", SMALL | {"embedding_size": 16}),
    Family(
        "ALBERT, 2 groups of 2", "Albert", SMALL | {"embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2}
    ),
    Family("MPNet", "MPNet", SMALL | {"pad_token_id": 0}),
    Family("DeBERTa", "Deberta", SMALL | RELATIVE),
    Family(
        "DeBERTa v2, with a convolution", "DebertaV2", SMALL | RELATIVE | {"conv_kernel_size": 3, "conv_act": "gelu"}
    ),
    Family(
        "DeBERTa v3",
        "DebertaV2",
        SMALL
        | RELATIVE
        | {"share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    ),
    Family(
        "ModernBERT",
        "ModernBert",
        SMALL | ENDS | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    ),
    Family("NomicBERT", "NomicBert", SMALL | {"pad_token_id": 0}),
    Family("Funnel", "Funnel", {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1]}),
    Family("XLNet", "XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0}),
    Family("CANINE", "Canine", SMALL, vocabulary=False),
    Family("GPT-2", "GPT2", GPT | {"pad_token_id": 0}),
    Family("GPT-2 without a padding token", "GPT2", GPT),
    Family("GPT-NeoX", "GPTNeoX", SMALL | ENDS),
    Family("OPT", "OPT", SMALL | ENDS | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("BLOOM", "Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4} | ENDS),
    Family("Falcon", "Falcon", SMALL | ENDS),
    Family("Llama", "Llama", GROUPED),
    Family("Mistral, window", "Mistral", GROUPED | {"sliding_window": 6}),
    Family("Qwen2, window", "Qwen2", GROUPED | WINDOW | {"use_sliding_window": True, "max_window_layers": 0}),
    Family("Qwen3", "Qwen3", GROUPED | {"head_dim": 8}),
    Family("Gemma", "Gemma", GROUPED | {"head_dim": 8}),
    Family(
        "Gemma 2, soft cap and window",
        "Gemma2",
        GROUPED | WINDOW | {"head_dim": 8, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    ),
    Family("Gemma 3, window", "Gemma3Text", GROUPED | WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    Family("Phi-3", "Phi3", GROUPED | {"sliding_window": 6}),
    Family("Mixtral", "Mixtral", GROUPED | {"num_local_experts": 2}),
    Family("T5", "T5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    Family("BART", "Bart", {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0} | PARTS),
    Family("Llama, causal LM", "Llama", GROUPED, head="ForCausalLM"),
    Family("BERT, token classification", "Bert", SMALL, head="ForTokenClassification"),
    Family("RoBERTa, token classification", "Roberta", SMALL | {"pad_token_id": 0}, head="ForTokenClassification"),
    Family("MPNet, token classification", "MPNet", SMALL | {"pad_token_id": 0}, head="ForTokenClassification"),
    Family("BERT, multi-label", "Bert", SMALL | {"problem_type": "multi_label_classification"}),
    Family("BERT, a reranker", "Bert", SMALL | {"num_labels": 1}, task="reranker"),
    Family("BERT, embeddings", "Bert", SMALL, head="Model", task="embedding"),
    Family("MPNet, embeddings", "MPNet", SMALL | {"pad_token_id": 0}, head="Model", task="embedding"),
    Family("BERT, a regression of 2 numbers", "Bert", SMALL | {"num_labels": 2, "problem_type": "regression"}),
    Family(
        "BERT, quantised",
        "Bert",
        SMALL,
        extra={"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ),
    Family("ViT", "ViT", SMALL | {"image_size": 16, "patch_size": 8}, head="ForImageClassification", vocabulary=False),
    Family(
        "Whisper",
        "Whisper",
        {
            "d_model": 32,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "pad_token_id": 0,
            "classifier_proj_size": 16,
        }
        | PARTS,
        head="ForAudioClassification",
    ),
    Family("CLIP", "CLIP", {"projection_dim": 16}, head="Model", vocabulary=False),
)
"""All that the page tells of, in its order."""
