"""A GGUF file as a checkpoint: the numbers that it stands for, both digests, and no file of another kind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from qrlora_deploy.errors import InputError, MissingPartError
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.gguf_files import convert_gguf
from tests.tiny_decoder import CHATML, build_byte_pairs, save_decoder

HEADS = {"q_proj": 4, "k_proj": 2}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(base: Path, path: Path, quantised: bool) -> None:
    """The tiny decoder as llama.cpp's own converter writes it; matrices in Q8_0 where that is asked for."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf, an extra of its own")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(360)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_chat_template(CHATML)
    for name, tensor in safetensors.torch.load_file(base / "model.safetensors").items():
        array = tensor.float().numpy()
        own = NAMES.get(name)
        if own is None:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            own = f"blk.{layer}.{LAYER_NAMES[part]}.weight"
            heads = HEADS.get(part.rpartition(".")[2])
            if heads:  # llama.cpp turns neighbouring pairs, transformers the two halves of a head
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if quantised and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(own, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "base"
    return save_decoder(folder, intermediate_size=64, vocab_size=360, tie_word_embeddings=False)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = open_checkpoint(str(folder)).load_model()(torch.tensor([[3, 40, 5, 60, 7]])).logits
    return found


@pytest.mark.parametrize(("quantised", "bound"), [(False, 1e-5), (True, 0.2)])
def test_the_checkpoint_answers_as_the_model_that_was_written(
    base: Path, tmp_path: Path, quantised: bool, bound: float
) -> None:
    write_gguf(base, tmp_path / "a.gguf", quantised)
    record = convert_gguf(tmp_path / "a.gguf", tmp_path / "made")
    expected = logits(base)
    difference = float((logits(tmp_path / "made") - expected).abs().max())
    assert difference <= bound and (difference > 1e-4) == quantised and expected.std() > 1
    assert record == json.loads((tmp_path / "made" / "conversion.json").read_text())
    assert record["source_digest"] == digest_file(tmp_path / "a.gguf")
    checkpoint = open_checkpoint(str(tmp_path / "made"))
    assert record["base_digest"] == checkpoint.digest and checkpoint.writes_text
    assert record["stored_types"] == ({"F32": 5, "Q8_0": 16} if quantised else {"F32": 21})
    own = build_byte_pairs()
    text = "book a flight to paris<|im_end|>"
    assert checkpoint.tokenizer()(text)["input_ids"] == own(text)["input_ids"]
    assert checkpoint.tokenizer().chat_template == CHATML
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weights_in_16_bits(base: Path, tmp_path: Path, dtype: str) -> None:
    write_gguf(base, tmp_path / "a.gguf", quantised=False)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "made", dtype)
    stored = open_checkpoint(str(tmp_path / "made")).stored
    assert {tensor.dtype for tensor in stored.values()} == {{"fp16": "F16", "bf16": "BF16"}[dtype]}


def test_what_is_no_gguf_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf, an extra of its own")
    with pytest.raises(InputError, match="model.safetensors is no GGUF file; `convert` reads these alone"):
        convert_gguf(base / "model.safetensors", tmp_path / "made")
    write_gguf(base, tmp_path / "a.gguf", quantised=False)
    content = (tmp_path / "a.gguf").read_bytes()
    for cut in (4, 30, 4000, len(content) // 2):
        (tmp_path / "cut.gguf").write_bytes(content[:cut])
        with pytest.raises(InputError, match="cut.gguf (is no whole GGUF file|cannot be converted): "):
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "made")
    with pytest.raises(InputError, match="dtype must be one of fp32, fp16, bf16, not int4"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "made", "int4")
    assert not (tmp_path / "made").exists()

    def without(modules: Any) -> list[str]:
        return [module for module in modules if module == "gguf"]

    monkeypatch.setattr("qrlora_deploy.installation.parts.lacking", without)
    with pytest.raises(MissingPartError, match=r"a GGUF file needs gguf.*pip install 'qrlora-deploy\[gguf\]'"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "made")


def test_weights_that_are_no_numbers_are_refused_by_the_name_of_the_file(base: Path, tmp_path: Path) -> None:
    write_gguf(base, tmp_path / "a.gguf", quantised=False)
    with (tmp_path / "a.gguf").open("rb+") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)
    with pytest.raises(InputError, match=r"a\.gguf cannot be converted: weights hold NaN or Inf") as caught:
        convert_gguf(tmp_path / "a.gguf", tmp_path / "made")
    assert ".part" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
