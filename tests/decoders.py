"""Small random decoders, their bases, customers, references and bundles, for tests of exporters and others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from tests.tiny import build_tokenizer

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
"""Ends of the names of the linear layers of all families."""

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def save_decoder(folder: Path, family: str = "Llama", **changes: Any) -> Path:
    """A seeded random causal LM of a family of transformers, with a tokenizer and a chat template; returns `folder`."""
    import torch
    import transformers

    tokenizer = build_tokenizer(128)
    tokenizer.chat_template = CHAT
    settings = SIZES | {"vocab_size": len(tokenizer) + 3, "tie_word_embeddings": True} | changes
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
        for name, parameter in model.named_parameters():
            # Gains, biases and logits that matter: zeros and ones would hide that one is missing.
            spread = 0.2 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
            centre = 1.0 if name.endswith("norm.weight") and not family.startswith("Gemma") else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_basis(checkpoint: Checkpoint, targets: tuple[str, ...] = ALL, rank: int = 5) -> Basis:
    """A basis of the layers whose names end so, of ranks that differ, by LAPACK."""
    from qrlora_deploy.factorization.decomposition import factorize_weight
    from qrlora_deploy.rank_rules.fixed_rank import FixedRank

    model = checkpoint.skeleton()
    names = [name for name, _module in model.named_modules() if name.endswith(targets)]
    made = []
    for index, name in enumerate(names):
        tensor = checkpoint.tensor_of(name, model)
        found, kept = factorize_weight(checkpoint.read(tensor).double().numpy()), rank + index % 3
        factors = (found.q[:, :kept], found.r[:kept], found.diagonal)
        q, r, diagonal = (np.ascontiguousarray(factor, dtype=np.float32) for factor in factors)
        made.append(BasisTarget(name, q, r, diagonal, checkpoint.tensor_digest(tensor)))
    return Basis(tuple(made), checkpoint.name, FixedRank(rank), {})


def make_customers(basis: Basis, count: int = 3) -> np.ndarray:
    """`[count, total_rank]` fp32; the first one is the base."""
    values = np.random.default_rng(7).normal(0, 1.0, (count, basis.total_rank)).astype(np.float32)
    values[0] = 0
    return values


@dataclass(frozen=True)
class Forced:
    """Rows of different lengths that go on with given tokens, and PyTorch's logits.

    Attributes:
        prompts: of each row.
        following: `[rows, steps]`, what each row is made to say.
        logits: `[rows, steps + 1, vocabulary]` fp32: behind the prompt, and behind each step.
    """

    prompts: list[np.ndarray]
    following: np.ndarray
    logits: np.ndarray


def force(
    checkpoint: Checkpoint,
    basis: Basis,
    customers: np.ndarray,
    lengths: tuple[int, ...] = (11, 4, 7),
    steps: int = 4,
) -> Forced:
    """What transformers' own forward gives for a customer in each row, with side branches in the model."""
    import torch
    from transformers import AutoModelForCausalLM

    from qrlora_deploy.models.adapter import insert, set_coefficients

    random = np.random.default_rng(3)
    vocabulary = checkpoint.config.vocab_size
    prompts = [random.integers(4, vocabulary, length) for length in lengths]
    following = random.integers(4, vocabulary, (len(lengths), steps))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, attn_implementation="eager")
    adapters = insert(model.eval(), basis)
    logits = []
    for prompt, after, values in zip(prompts, following, customers, strict=True):
        set_coefficients(adapters, basis, values)
        with torch.no_grad():
            found = model(torch.from_numpy(np.concatenate([prompt, after]))[None]).logits[0]
        logits.append(found[len(prompt) - 1 :].numpy())
    return Forced(prompts, following, np.stack(logits))


def run_forced(session: Any, forced: Forced, further: dict[str, np.ndarray], buffer: int = 32) -> np.ndarray:
    """The same logits from a graph in ONNX Runtime: one prefill of all rows, padded on the right, then step by step."""
    rows, longest = len(forced.prompts), max(map(len, forced.prompts))
    lengths = np.array([len(prompt) for prompt in forced.prompts])
    caches = {
        value.name: np.zeros([rows, value.shape[1], buffer, value.shape[3]], NUMPY[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    names = ["logits", *(name.replace("past_key_values", "present") for name in caches)]

    def step(ids: np.ndarray, valid: np.ndarray, total: int, token: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": ids, "seqlens_k": (valid - 1).astype(np.int32), "token": token}
        inputs["total_sequence_length"] = np.array([total], np.int32)
        logits, *present = session.run(names, inputs | caches | further)
        caches.update(zip(caches, present, strict=True))
        return np.asarray(logits)

    ids = np.stack([np.pad(prompt, (0, longest - len(prompt)), constant_values=1) for prompt in forced.prompts])
    found = [step(ids, lengths, longest, np.arange(rows) * longest + lengths - 1)]
    for index, tokens in enumerate(forced.following.T):
        found.append(step(tokens[:, None], lengths + index + 1, buffer, np.arange(rows)))
    return np.stack(found, axis=1)


NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def write_tiny(
    folder: Path, checkpoint: Checkpoint, basis: Basis, values: np.ndarray | None = None, **options: Any
) -> Path:
    """`model.onnx` of a decoder and its weights in `folder`; returns the file.

    Args:
        values: of the customer that is folded in; None: switchable.
        options: of `exporters.onnx.decoder.graph.Plan`.
    """
    from exporters.onnx.decoder.graph import Plan, write_decoder
    from exporters.onnx.decoder.shape import read_shape
    from exporters.onnx.decoder.tensors import Tensors

    folder.mkdir(exist_ok=True)
    tensors = Tensors(checkpoint.stored, checkpoint.name)
    write_decoder(
        Plan(read_shape(checkpoint.config, checkpoint.name), tensors, basis, values, **options), folder, "model.onnx"
    )
    return folder / "model.onnx"


def save_tiny(folder: Path, family: str = "Llama", **changes: Any) -> Checkpoint:
    """The checkpoint of `save_decoder`."""
    return open_checkpoint(str(save_decoder(folder, family, **changes)))


def save_bundle(folder: Path, checkpoint: Checkpoint, basis: Basis, **options: Any) -> Path:
    """A whole switchable bundle of a decoder, exported and checked; returns `folder`."""
    from exporters.onnx.exporter import EXPORTER
    from exporters.onnx.options import OnnxOptions
    from qrlora_deploy.exporting.job import ExportJob

    EXPORTER.export(ExportJob(checkpoint, basis, folder), OnnxOptions(**options))
    return folder
