"""`genai_config.json`, by which onnxruntime-genai opens a model."""

from collections.abc import Mapping
from typing import Any

from exporters.genai.building import Sizes

KNOWN = frozenset({"gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"})
"""Model types that onnxruntime-genai calls as transformers does; the others are a "decoder"."""

SEARCH: Mapping[str, Any] = {
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 1,
    "top_p": 1.0,
}


def genai_config(
    config: Any, sizes: Sizes, generation: Mapping[str, Any], file: str, padding: int, provider: str
) -> dict[str, Any]:
    """The file's content.

    Args:
        config: of the base, as transformers has it.
        sizes: of the graph.
        generation: the base's `generation_config.json`.
        file: the ONNX file, in the folder.
        padding: id of the token that fills rows up.
        provider: where it runs, "cpu" or "cuda".
    """
    ends = generation.get("eos_token_id")
    ends = config.eos_token_id if ends is None else ends
    begin = generation.get("bos_token_id")
    begin = config.bos_token_id if begin is None else begin
    context = sizes.positions
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": _providers(provider)},
        "filename": file,
        "head_size": sizes.head_size,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": sizes.kv_heads,
    }
    model = {
        **({} if begin is None else {"bos_token_id": begin}),
        "context_length": context,
        "decoder": decoder,
        "eos_token_id": padding if ends is None else ends,
        "pad_token_id": padding,
        "type": config.model_type if config.model_type in KNOWN else "decoder",
        "vocab_size": sizes.vocabulary,
    }
    return {"model": model, "search": {**SEARCH, "max_length": context, "past_present_share_buffer": sizes.in_place}}


def _providers(provider: str) -> list[dict[str, Any]]:
    return [] if provider == "cpu" else [{provider: {}}]
