"""Rotary positions, sliding windows and soft caps: in the graph, for batches and for every kind of padding."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters.onnx import attention, export_merged, export_switchable
from exporters.onnx.attention import onnx_attention
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import CheckFailed, InputError, ProviderError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.capacity import max_tokens
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.support import check_padding, why_unsupported
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime import open_bundle, open_session, verify
from tests.tiny import build_tokenizer
from tests.tolerances import FP32_ONNX, FP32_SIDE_BRANCH

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64}
GROUPED = SMALL | SPECIAL | {"num_key_value_heads": 2}
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 6}),
    "qwen2": ("Qwen2", GROUPED | MIXED | {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "phi3": ("Phi3", GROUPED | {"sliding_window": 6}),
    "gemma": ("Gemma", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2", GROUPED | MIXED | {"head_dim": 8, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", GROUPED | MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "modernbert": (
        "ModernBert",
        SMALL | SPECIAL | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    ),
}
FAST = ("gemma2", "modernbert")


def save_family(name: str, folder: Path, **changes: Any) -> Path:
    """A seeded classifier whose scores are large enough that a cap or a window decides its answers."""
    import transformers

    family, sizes = FAMILIES[name]
    tokenizer = build_tokenizer()
    model_class = getattr(transformers, f"{family}ForSequenceClassification", None)
    if model_class is None:
        pytest.skip(f"this transformers has no classifier of {family}")
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer) + 8, num_labels=4, **sizes | changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_job(
    name: str, folder: Path, texts: Examples, kind: str = "switchable", **options: Any
) -> tuple[ExportJob, OnnxOptions]:
    changes = options.pop("changes", {})
    checkpoint = open_checkpoint(str(save_family(name, folder / "base", **changes)))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    customer = None
    if kind == "merged":
        values = np.random.default_rng(5).uniform(0.3, 1.0, basis.total_rank).astype(np.float32)
        customer = Coefficients(
            values, basis.digest, checkpoint.name, checkpoint.digest, checkpoint.task, checkpoint.labels
        )
    return ExportJob(checkpoint, basis, folder / "bundle", customer), OnnxOptions(data=texts, **options)


def pytorch_logits(job: ExportJob, inputs: dict[str, np.ndarray]) -> np.ndarray:
    model = job.checkpoint.load_model(attn_implementation="eager")
    with torch.no_grad():
        logits: np.ndarray = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
    return logits


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]
)
def test_a_customer_in_each_row_of_every_family(name: str, tmp_path: Path, texts: Examples) -> None:
    job, options = make_job(name, tmp_path, texts)
    manifest = export_switchable(job, options)
    # Left padding, masks with holes and texts of several windows are among the cases.
    assert manifest.parity.max_abs_error <= manifest.parity.bound < manifest.customer_effect / 10
    assert manifest.parity.not_shown == ()
    assert verify(open_bundle(job.output)).passed
    graph = onnx.load(job.output / "model.onnx", load_external_data=False).graph
    assert "RotaryEmbedding" not in {node.op_type for node in graph.node}
    # Not of the reference: a batch whose left padding is longer than the window, row by row by PyTorch without it.
    random, session = np.random.default_rng(1), open_session(job.output / "model.onnx", threads=1)
    rows = [random.integers(5, 60, length) for length in (20, 4, 12)]
    before = (0, 0, 0) if name == "modernbert" else (0, 16, 8)
    padded = [np.pad(ids, (gap, 20 - len(ids) - gap)) for ids, gap in zip(rows, before, strict=True)]
    masks = [np.pad(np.ones_like(ids), (gap, 20 - len(ids) - gap)) for ids, gap in zip(rows, before, strict=True)]
    table = next(value.shape[1] for value in session.get_inputs() if value.name == "coefficient_table")
    inputs = {"input_ids": np.stack(padded), "attention_mask": np.stack(masks), "slot": np.array([0, 0, 0])}
    found = session.run(None, inputs | {"coefficient_table": np.zeros((1, table), np.float32)})[0]
    ones = [np.ones((1, len(ids)), dtype=np.int64) for ids in rows]
    alone = [
        pytorch_logits(job, {"input_ids": ids[None], "attention_mask": mask})
        for ids, mask in zip(rows, ones, strict=True)
    ]
    np.testing.assert_allclose(found, np.concatenate(alone), **FP32_ONNX)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "modernbert"])
def test_other_precisions(name: str, precision: str, tmp_path: Path, texts: Examples) -> None:
    # A cap far below the scores leaves a softmax whose weights are nearly equal, which suits rounding.
    manifest = export_merged(*make_job(name, tmp_path, texts, "merged", precision=precision))
    assert manifest.parity.max_abs_error <= manifest.parity.bound


def test_a_graph_without_its_cap_or_its_window_is_caught(
    tmp_path: Path, texts: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, options = make_job("gemma2", tmp_path, texts, "merged")
    whole = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, **k: whole(*a[:4], replace(a[4], softcap=None), *a[5:], **k))
    with pytest.raises(CheckFailed, match="logits differ from PyTorch"):
        export_merged(job, options)
    assert not job.output.exists()


def test_what_the_texts_cannot_tell_is_named(tmp_path: Path, texts: Examples) -> None:
    changes = {"attn_logit_softcapping": 1e5, "sliding_window": 100}
    manifest = export_merged(*make_job("gemma2", tmp_path, texts, "merged", changes=changes))
    assert manifest.parity.not_shown == ("attention window", "soft cap")
    assert open_bundle(tmp_path / "bundle").manifest.parity.not_shown == manifest.parity.not_shown


@pytest.mark.parametrize("mask", ["boolean", "float", "causal"])
def test_capped_scores_are_masked_after_the_cap(mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (3 * torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    allowed = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]]).bool()[:, None, None, :].expand(2, 1, 6, 6)
    if mask == "causal":
        allowed = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)
    given = {"boolean": allowed, "float": additive, "causal": None}[mask]
    module = SimpleNamespace(is_causal=mask == "causal")
    found, _ = onnx_attention(module, query, key, value, given, scaling=0.3, softcap=2.0)
    scores = 2 * torch.tanh(query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3 / 2)
    expected = (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), **FP32_SIDE_BRANCH)


def test_what_attention_would_not_do_is_refused_by_name() -> None:
    states = torch.randn(1, 2, 3, 4)
    module = SimpleNamespace(is_causal=False)
    neutral = {"dropout": 0.0, "position_ids": torch.arange(3), "output_attentions": False, "s_aux": None}
    onnx_attention(module, states, states, states, None, **neutral)
    for name in ("s_aux", "position_bias", "indices"):
        with pytest.raises(InputError, match=f"asks its attention for {name}, which"):
            onnx_attention(module, states, states, states, None, **{name: torch.zeros(2)})
    with pytest.raises(InputError, match="looks 4 tokens far, but has no mask"):
        onnx_attention(module, states, states, states, None, sliding_window=4)


def test_texts_beyond_the_first_table_of_angles_are_cut() -> None:
    config = SimpleNamespace(
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    )
    model = SimpleNamespace(config=config, named_modules=list)
    assert max_tokens(model, SimpleNamespace(model_max_length=131072)) == 4096


def test_padding_free_is_refused_for_rotary_positions(tmp_path: Path, texts: Examples) -> None:
    with pytest.raises(InputError, match=r"rotary positions|its attention is its own"):
        export_switchable(*make_job("modernbert", tmp_path, texts, padding_free=True))


def test_models_that_cannot_be_exported_say_why() -> None:
    from transformers import BartConfig, BartForSequenceClassification

    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    with torch.device("meta"):
        bart = BartForSequenceClassification(BartConfig(d_model=8, vocab_size=9, **sizes))
    assert "encoder with a decoder" in (why_unsupported(bart) or "")
    experts = torch.nn.Module()
    experts.config = SimpleNamespace()
    experts.register_module("experts", torch.nn.Module())
    experts.experts.register_parameter("gate_up_proj", torch.nn.Parameter(torch.zeros(2, 3, 4)))
    assert "mixture of experts (experts.gate_up_proj" in (why_unsupported(experts) or "")


@pytest.mark.parametrize(
    ("tokenizer_pad", "config_pad", "message"),
    [
        (None, None, r"pad_token in tokenizer_config\.json .* and pad_token_id in config\.json"),
        (3, None, r"pad_token_id in config\.json, to 3"),
        (3, 5, r"pads with token 3, but pad_token_id in config\.json is 5"),
        (3, 3, None),
    ],
)
def test_a_padding_token_is_asked_for_in_both_places(
    tokenizer_pad: int | None, config_pad: int | None, message: str | None
) -> None:
    decoder = torch.nn.Module()
    decoder.config, decoder.is_causal = SimpleNamespace(pad_token_id=config_pad), True
    tokenizer = SimpleNamespace(pad_token_id=tokenizer_pad)
    if message is None:
        check_padding("base", decoder, tokenizer)
        return
    with pytest.raises(InputError, match=message):
        check_padding("base", decoder, tokenizer)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "modernbert"])
def test_rotary_models_on_a_gpu(name: str, precision: str, tmp_path: Path, texts: Examples) -> None:
    try:
        manifest = export_switchable(*make_job(name, tmp_path, texts, provider="cuda", precision=precision))
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    assert manifest.parity.provider == "cuda"
    assert manifest.parity.max_abs_error <= manifest.parity.bound
