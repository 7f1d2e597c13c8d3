"""Continuous batching by static batches of the same size, through the runtime's own session.

Prompts and answers have the lengths of chats: lognormal with the means below, which are those that are reported of
shared chats, and of two in three within a factor of e of the median. A static batch waits for its longest answer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.measuring import summary
from benchmarks.decoding.shapes import SHAPES, make_basis, make_customers, save_model
from exporters.onnx.exporter import EXPORTER
from exporters.onnx.options import OnnxOptions
from exporters.onnx.synthetic_customers import base_customer
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.session import GenerationSession

PROMPT_MEAN, ANSWER_MEAN = 161, 338
LONGEST = 1024


@dataclass(frozen=True)
class Chats:
    """Requests, and how they are asked.

    Attributes:
        rows: of a batch.
        scale: by which all lengths are divided.
    """

    requests: int
    rows: int
    scale: int = 1


def lengths(mean: float, count: int, longest: int, random: np.random.Generator) -> np.ndarray:
    """Lognormal whole numbers from 1 to `longest`; the mean is that before the cut."""
    drawn = random.lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(np.rint(drawn), 1, longest).astype(int)


def make_requests(chats: Chats, vocabulary: int, customers: Sequence[str]) -> list[GenerationRequest]:
    """Seeded prompts of random tokens, the customers in turn."""
    random = np.random.default_rng(4)
    longest = LONGEST // chats.scale
    prompts = lengths(PROMPT_MEAN / chats.scale, chats.requests, longest, random)
    answers = lengths(ANSWER_MEAN / chats.scale, chats.requests, longest, random)
    return [
        GenerationRequest(
            [int(token) for token in random.integers(10, vocabulary, prompt)],
            customer=customers[number % len(customers)],
            max_tokens=int(answer),
        )
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def measure_batching(folder: Path, name: str, device: str, chats: Chats, rounds: int) -> dict[str, Any]:
    """Tokens a second both ways; the answers must be the same but for the order of sums."""
    bundle = export(folder, name, device)
    # One size of everything: a static batch is as wide to its end, and all rows run together.
    options: dict[str, Any] = {
        "provider": device,
        "max_rows": chats.rows,
        "batches": [chats.rows],
        "capacities": [2 * LONGEST],
        "max_cache_bytes": 2**34,
    }
    with GenerationSession.open(bundle, customers=folder / "customers", **options) as session:
        customers = sorted(file.stem for file in (folder / "customers").glob("*.safetensors"))
        requests = make_requests(chats, SHAPES[name].config["vocab_size"], customers)
        for request in requests[: chats.rows]:
            session.answers([request])
        seconds: dict[str, list[float]] = {"continuous": [], "static": []}
        tokens: set[int] = set()
        for _ in range(rounds):
            for way in np.random.default_rng(len(tokens)).permutation(list(seconds)):
                size = len(requests) if way == "continuous" else chats.rows
                start = time.perf_counter()
                answers = [
                    answer
                    for first in range(0, len(requests), size)
                    for answer in session.answers(requests[first : first + size])
                ]
                seconds[str(way)].append(time.perf_counter() - start)
                tokens.add(sum(len(answer.tokens) for answer in answers))
                _check_whole(answers, requests)
    print(f"{name}, {chats}: {seconds}", flush=True)
    batches = [requests[first : first + chats.rows] for first in range(0, len(requests), chats.rows)]
    return {
        "shape": name,
        "requests": chats.requests,
        "rows": chats.rows,
        "tokens": max(tokens),
        "steps_of_static_batches": sum(max(one.max_tokens for one in batch) for batch in batches),
        "steps_at_least": -(-sum(one.max_tokens for one in requests) // chats.rows),
        "seconds": {way: summary(taken, 1.0) for way, taken in seconds.items()},
    }


def _check_whole(answers: Sequence[Any], requests: Sequence[GenerationRequest]) -> None:
    for answer, request in zip(answers, requests, strict=True):
        if answer.error is not None:
            raise answer.error
        if len(answer.tokens) != request.max_tokens and answer.finish_reason != "stop":
            raise ValueError(f"an answer has {len(answer.tokens)} tokens, not {request.max_tokens}")


def export(folder: Path, name: str, device: str) -> Path:
    """A whole bundle with branches on q and v, and a folder of eight customers."""
    shape = SHAPES[name]
    _save_tokenizer(folder / "base", shape.config["vocab_size"])
    save_model(folder / "base", shape, torch.float32, "cpu")
    checkpoint = open_checkpoint(str(folder / "base"))
    basis = make_basis(checkpoint, shape, ("q", "v"), sealed=True)
    base = base_customer(checkpoint, basis)
    (folder / "customers").mkdir()
    for number, values in enumerate(make_customers(basis, 9)[1:]):
        replace(base, values=values).save(folder / "customers" / f"customer-{number}.safetensors")
    options = OnnxOptions(provider=device, precision="fp16" if device == "cuda" else "fp32")
    EXPORTER.export(ExportJob(checkpoint, basis, folder / "bundle"), options)
    return folder / "bundle"


def _save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word a token: prompts are given as tokens, and answers have to become some text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w1", pad_token="w0", eos_token="w2", model_max_length=2048
    ).save_pretrained(folder)
