"""A repository of every kind of task: the front answers as the predictor does on a bundle of the same base."""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from exporters.onnx import export_switchable
from exporters.onnx.options import OnnxOptions
from exporters.triton.options import TritonOptions
from exporters.triton.repository import export_repository
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime import Predictor, open_bundle
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.triton.front import Front
from tests.exporters.triton.fake_backend import MOST_ROWS, Asked, Backend
from tests.exporters.triton.test_front import parameters_of
from tests.tiny import SENTENCES, build_tokenizer
from tests.tolerances import FP32_ONNX

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
OWNERS = ["acme", None, "acme", "acme", None, "acme"]


def bert(model_class: type[Any], **more: Any) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id}
        return model_class(BertConfig(**sizes, **SMALL, **more))

    return make


def gpt2(tokenizer: Any) -> Any:
    tokenizer.padding_side = "left"
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=tokenizer.pad_token_id, num_labels=3))


TAGS = dict(enumerate(["O", "B-X", "I-X", "B-Y", "I-Y"]))
MODELS: dict[str, Callable[[Any], Any]] = {
    "embedding": bert(BertModel),
    "token-classification": bert(BertForTokenClassification, id2label=TAGS, label2id={v: k for k, v in TAGS.items()}),
    "reranker": bert(BertForSequenceClassification, num_labels=1),
    "multi-label": bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
    "left padding": gpt2,
}


@dataclass
class Served:
    """A front and the predictor that it is held against."""

    front: Front
    predictor: Predictor
    config: str

    def ask(self, **inputs: list[str]) -> dict[str, np.ndarray]:
        owners = {"customer": [name or "" for name in OWNERS]}
        names = re.findall(r'output \{\n  name: "(\w+)"', self.config)
        (response,) = asyncio.run(self.front.execute([Asked(inputs | owners, names, {})]))
        assert not response.has_error(), response.error().message()
        return response.arrays()


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Served:
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = MODELS[request.param](tokenizer).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    option = request.param if request.param in ("reranker", "embedding") else None
    checkpoint = open_checkpoint(str(tmp_path / "base"))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    export_switchable(ExportJob(checkpoint, basis, tmp_path / "bundle"), OnnxOptions(task=option))
    (tmp_path / "customers").mkdir()
    options = TritonOptions(max_batch=MOST_ROWS, customers=str(tmp_path / "customers"), task=option)
    export_repository(ExportJob(checkpoint, basis, tmp_path / "models"), options)

    bundle = open_bundle(tmp_path / "bundle")
    random = np.random.default_rng(3)
    values = random.uniform(0.5, 1.5, basis.total_rank) * random.choice([-1.0, 1.0], basis.total_rank)
    acme = Coefficients(
        values=values.astype(np.float32),
        basis_digest=basis.digest,
        base_name="base",
        base_digest=checkpoint.digest,
        task=bundle.manifest.task,
        labels=bundle.manifest.labels,
    )
    write_coefficients(acme, tmp_path / "customers" / "acme.safetensors")
    session = SwitchableSession(bundle, threads=1)
    session.load("acme", acme)
    place = tmp_path / "models" / "qrlora"
    config = {
        "max_batch_size": MOST_ROWS,
        "parameters": {name: {"string_value": value} for name, value in parameters_of(place / "config.pbtxt").items()},
    }
    arguments = {"model_config": json.dumps(config), "model_repository": str(place), "model_version": "1"}
    front = Front(Backend(tmp_path / "models"), arguments)
    request.addfinalizer(front.close)
    return Served(front, Predictor(session), (place / "config.pbtxt").read_text())


def test_answers_are_the_predictors(served: Served) -> None:
    task, texts = served.predictor.task, list(SENTENCES)
    if not task.has_labels:
        found = served.ask(text=texts)
        expected = served.predictor.embed(texts, customers=OWNERS)
        assert set(found) == {"embeddings", "digest"} and "text_pair" not in served.config
        np.testing.assert_allclose(found["embeddings"], expected, **FP32_ONNX)
    elif task.answers_words:
        found = served.ask(text=texts)
        assert set(found) == {"spans", "digest"} and "text_pair" not in served.config
        for row, wanted in enumerate(served.predictor.predict(texts, customers=OWNERS)):
            spans = json.loads(found["spans"][row, 0])
            expected = [asdict(span) for span in wanted.spans]
            scores = [span.pop("score") for span in spans], [span.pop("score") for span in expected]
            assert spans == expected
            np.testing.assert_allclose(*scores, **FP32_ONNX)
        assert any(len(json.loads(text)) > 1 for text in found["spans"][:, 0])
    else:
        pairs = texts[::-1] if task.needs_pairs else None
        if pairs:
            (alone,) = asyncio.run(served.front.execute([Asked({"text": texts}, ["label"], {})]))
            assert alone.error().code == "INVALID_ARG" and "text_pair" in alone.error().message()
        found = served.ask(text=texts, **({"text_pair": pairs} if pairs else {}))
        wanted = served.predictor.predict(texts, pairs, customers=OWNERS)
        np.testing.assert_allclose(found["logits"], [one.logits for one in wanted], **FP32_ONNX)
        assert [label.decode() for label in found["label"][:, 0]] == [one.label for one in wanted]
    different = served.front.bundle.manifest.customer_effect
    assert different > 0.01 and len(set(found["digest"][:, 0].tolist())) == 2
