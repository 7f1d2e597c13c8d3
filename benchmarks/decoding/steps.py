"""A token at a time: the graphs beside PyTorch's ways, by batch; PEFT's batch of customers; many customers resident."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.decoding.bench import Bench, Timed, in_rounds
from benchmarks.decoding.names import COMPILED, EAGER, FEW, MANY, PEFT, STATIC, resident
from benchmarks.decoding.peers import Generate, Static, with_customers

COMPILE_SECONDS = 75.0
"""That compiling one batch may take."""

SAME_SHARE = 0.5
"""Of the first tokens of a peer that must be those of `generate`: fp16 sums in another order part ways now and then."""


def measure_steps(bench: Bench) -> dict[str, Any]:
    """By batch: every graph, eager `generate`, the static cache and torch.compile."""
    return {str(rows): _measure_batch(bench, rows) for rows in bench.settings.batches}


def _measure_batch(bench: Bench, rows: int) -> dict[str, Any]:
    settings, failed, same = bench.settings, {}, {}
    ids = bench.ids(rows)
    contenders: dict[str, Timed] = {name: bench.writer(name, rows) for name in bench.graphs}
    eager = Generate(bench.model, settings.device, settings.new)
    first = Generate(bench.model, settings.device, 4).tokens(ids)[:, 0]
    peers: dict[str, Callable[[], Static]] = {STATIC: lambda: _static(bench, rows, False)}
    if rows in settings.compiled and settings.has(COMPILE_SECONDS):
        peers[COMPILED] = lambda: _static(bench, rows, True)
    for name, make in peers.items():
        try:
            torch._dynamo.reset()
            peer = make()
            same[name] = float((peer.tokens(ids)[:, 0] == first).float().mean())
            if same[name] < SAME_SHARE:
                raise ValueError(f"writes other tokens than generate: {same[name]:.2f} of the first are the same")
            contenders[name] = peer
        # A peer that does not run is reported; the others go on.
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
    for one in contenders.values():
        one.timed(ids)
    found = in_rounds(contenders, ids, settings.rounds)
    found |= in_rounds({EAGER: eager}, ids, min(2, settings.rounds))
    _show(bench, rows, found, failed)
    del contenders, peers
    gc.collect()
    return {"contenders": found, "failed": failed, "same_first_token": same}


def _static(bench: Bench, rows: int, compiled: bool) -> Static:
    settings = bench.settings
    return Static(bench.model, settings.device, rows, settings.prompt, settings.new, compiled)


def measure_resident(bench: Bench) -> dict[str, Any]:
    """A table of 10,000 customers by one of 10, all linear layers, the customers of the rows drawn from all."""
    rows = max(bench.settings.batches)
    own = bench.graphs["all"].table
    assert own is not None
    many = own[torch.arange(MANY, device=own.device) % len(own)]
    contenders: dict[str, Timed] = {
        resident(len(table)): bench.writer("all", rows, table) for table in (many, own[:FEW].contiguous())
    }
    for one in contenders.values():
        one.timed(bench.ids(rows))
    found = in_rounds(contenders, bench.ids(rows), 2 * bench.settings.rounds)
    _show(bench, rows, found, {})
    return {"rows": rows, "table_bytes": many.nbytes, "contenders": found}


def measure_peft(bench: Bench) -> dict[str, Any]:
    """PEFT's batch with as many customers as rows beside ours on q and v. PEFT changes the model: it comes last."""
    rows = max(bench.settings.batches)
    ids, settings = bench.ids(rows), bench.settings
    wrapped = with_customers(bench.model, rows)
    names = [f"c{number}" for number in range(rows)]
    peer = Generate(wrapped, settings.device, min(settings.new, 4), adapter_names=names)
    ours = bench.writer("qv", rows)
    ours.timed(ids)
    found = in_rounds({PEFT: peer, "qv": ours}, ids, min(3, settings.rounds))
    _show(bench, rows, found, {})
    return {"rows": rows, "contenders": found}


def _show(bench: Bench, rows: int, found: dict[str, dict[str, Any]], failed: dict[str, str]) -> None:
    for name, times in found.items():
        text = f"{times['token_ms']['p50']:9.3f} ms a token, {times['read_ms']['p50']:9.2f} ms the prompt"
        print(f"{bench.name} batch {rows:3} {name:30} {text}", flush=True)
    for name, reason in failed.items():
        print(f"{bench.name} batch {rows:3} {name:30} failed: {reason}", flush=True)
