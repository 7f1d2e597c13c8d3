"""One thread of a CPU: weights of 4 bits with branches in full, by transformers' eager fp32."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.decoding.bench import Timed, in_rounds
from benchmarks.decoding.checking import check
from benchmarks.decoding.graphs import Writer, open_graph, write_graph
from benchmarks.decoding.names import EAGER_FP32
from benchmarks.decoding.peers import Generate
from benchmarks.decoding.shapes import SHAPES, TARGETS, make_basis, make_customers, save_model


def measure_one_thread(folder: Path, name: str, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Batch 1: int4 and fp32, each without branches, with q and v, with all linear layers; CPU time of the process."""
    torch.set_num_threads(1)
    shape = SHAPES[name]
    checkpoint = save_model(folder / "base", shape, torch.float32, "cpu")
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, trust_remote_code=False).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(11))
    contenders: dict[str, Timed] = {EAGER_FP32: Generate(model, "cpu", new, time.process_time)}
    checks = {}
    for graph, targets in TARGETS.items():
        basis = make_basis(checkpoint, shape, targets)
        customers = make_customers(basis, 3)
        for precision, bits in (("fp32", 0), ("int4", 4)):
            label = f"{precision}, {graph}"
            made = write_graph(folder / label, label, checkpoint, basis, customers, "cpu", bits)
            session = open_graph(made, "cpu", 1)
            checks[label] = check(made, session, model, customers, "cpu", precision, min(prompt, 32), 1)
            slots = torch.ones(1, dtype=torch.int64)
            contenders[label] = Writer(session, "cpu", 1, prompt, new, made.table, slots, clock=time.process_time)
    for one in contenders.values():
        one.timed(ids)
    found = in_rounds(contenders, ids, rounds)
    for label, times in found.items():
        print(f"{name}, one thread, {label:24} {times['token_ms']['p50']:8.2f} ms of CPU a token", flush=True)
    return {"shape": name, "clock": "CPU time of the process", "checks": checks, "contenders": found}
