"""The parts of the GPU benchmark: which script with which options, and how long it is expected to take."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PADDED, PADDING_FREE = "padded", "padding-free"
SETUPS = {"paper": "query of the last 4 layers", "qv of 12": "q and v of all 12 layers"}
"""Side branches of benchmarks/gpu_graph/variants.py, r = 160."""

MERGED_GRAPHS = (PADDED, PADDING_FREE)
SWITCHABLE_GRAPHS = (*MERGED_GRAPHS, *(f"{setup}, {packing}" for setup in SETUPS for packing in MERGED_GRAPHS))
"""Graphs that the product writes. Others are tried in the benchmark only."""

SHAPES = {"roberta": "RoBERTa-base", "mpnet": "MPNet-base"}

MIXED = "--no-sessions"
"""One session per customer is measured with 8 customers only: with 64 it needs 64 copies of the base."""


@dataclass(frozen=True)
class Part:
    """One benchmark with its options, run in a process of its own.

    Attributes:
        name: of the part, its log and its record.
        title: what it measures, in a few words.
        module: run by `python -m`.
        options: all but the one that names the output.
        seconds: that it is expected to take, start and export included.
        flag: the option that names the output.
        endings: of the files that it writes, behind the name of the part.
        needs: graphs that must have run and passed their check in every batch.
        alike: runs what another part runs, with another shape; a quick run leaves it out.
    """

    name: str
    title: str
    module: str
    options: tuple[str, ...]
    seconds: float
    flag: str = "--out"
    endings: tuple[str, ...] = (".json",)
    needs: tuple[str, ...] = ()
    alike: bool = False

    @property
    def kind(self) -> str:
        """The first word of the name: parts of one kind write records of one form."""
        return self.name.partition("-")[0]

    @property
    def settings(self) -> list[str]:
        """What a record was made with; another list means another record."""
        return [self.module, *self.options]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(f"{self.name}{ending}" for ending in self.endings)

    @property
    def records(self) -> tuple[str, ...]:
        return tuple(name for name in self.files if name.endswith(".json"))

    def command(self, folder: Path) -> list[str]:
        """The command line that writes the files of this part into `folder`."""
        # A single file is given by its name, several by the beginning of theirs.
        target = self.files[0] if len(self.files) == 1 else self.name
        return [sys.executable, "-m", self.module, *self.options, self.flag, str(folder / target)]


def make_parts(device: str, quick: bool) -> tuple[Part, ...]:
    """Every part, the ones with aims first.

    Args:
        device: "cuda" or "cpu".
        quick: tiny shapes and few runs, to see that everything runs; "cpu" is for these alone.
    """
    parts = (*_factorization_and_graphs(), *_table_and_swaps(), *_training(), *_decoding(), *_reports())
    return tuple(_quick(part, device) for part in parts if not part.alike) if quick else parts


def _factorization_and_graphs() -> list[Part]:
    parts = [
        Part(
            "factorization",
            "pivoted QR beside svd, geqp3 and unpivoted QR",
            "benchmarks.gpu_factorization",
            ("--device", "cuda"),
            100,
            flag="-o",
        )
    ]
    for shape, name in SHAPES.items():
        options: tuple[str, ...] = ("--device", "cuda", "--shape", shape, "--group")
        module, title = "benchmarks.gpu_graph", f"merged graphs beside torch.compile, {name}'s shape"
        part = Part(f"graph-{shape}", title, module, (*options, "merged"), 170, needs=MERGED_GRAPHS)
        parts.append(replace(part, alike=shape == "mpnet"))
    for shape, name in SHAPES.items():
        options = ("--device", "cuda", "--shape", shape, "--group", "switchable", "--no-compile")
        title = f"switchable graphs beside merged ones, {name}'s shape"
        part = Part(f"switchable-{shape}", title, module, options, 190, needs=SWITCHABLE_GRAPHS)
        parts.append(replace(part, alike=shape == "roberta"))
    return parts


def _table_and_swaps() -> list[Part]:
    served = ("--provider", "cuda", "--precision", "fp16", "--cuda-graph", "--model", "roberta-base", "--rank", "160")
    return [
        Part("table", "ten million customers in a session", "benchmarks.gpu_table", ("--device", "cuda"), 120),
        Part(
            "swap",
            "swaps from memory and from disk",
            "benchmarks.swap",
            (*served, "--batch", "8", "--length", "128"),
            60,
            flag="-o",
        ),
    ]


def _training() -> list[Part]:
    thousand = ("--device", "cuda", "--shape", "mpnet", "--customers", "1000")
    return [
        Part(
            "training",
            "training on the cached trunk beside PEFT's LoRA",
            "benchmarks.training_speed",
            ("--device", "cuda", "--rounds", "3", "--steps", "40"),
            60,
        ),
        Part(
            "fleet",
            "a fleet of 1,000 customers beside PEFT's LoRA",
            "benchmarks.fleet",
            (*thousand, "--rounds", "3", "--sample", "4"),
            110,
        ),
        Part(
            "fleet-linear",
            "the same on all linear layers",
            "benchmarks.fleet",
            (*thousand, "--rounds", "2", "--sample", "4", "--targets", "linear"),
            170,
            alike=True,
        ),
    ]


def _decoding() -> list[Part]:
    module, options = "benchmarks.decoding", ("--device", "cuda", "--parts")
    large = ("steps", "resident", "kernels", "peft", "--shapes", "llama-3.2-1b", "--budget-seconds", "230")
    small = ("steps", "kernels", "--shapes", "smollm2-135m")
    return [
        Part("decoding", "a token of Llama-3.2-1B's shape beside PyTorch and PEFT", module, (*options, *large), 280),
        Part("decoding-small", "a token of SmolLM2-135M's shape", module, (*options, *small), 100, alike=True),
        Part("decoding-batching", "continuous beside static batches", module, (*options, "batching"), 120, alike=True),
    ]


def _reports() -> list[Part]:
    served = ("--provider", "cuda", "--model", "roberta-base", "--rank", "160")
    fp16 = (*served, "--precision", "fp16", "--cuda-graph", MIXED)
    shapes = ("--shape", "64x128", "--shape", "64x32", "--shape", "8x128", "--shape", "1x128")
    mixed, report = "benchmarks.mixed_batch", "benchmarks.gpu_report"
    both = (".json", ".html")
    return [
        Part("mixed-fp16", "mixed batches beside PEFT's, fp16", mixed, (*fp16, *shapes), 90, flag="-o"),
        Part(
            "mixed-fp32",
            "mixed batches beside PEFT's, fp32",
            mixed,
            (*served, MIXED, "--shape", "64x128"),
            70,
            flag="-o",
            alike=True,
        ),
        Part(
            "mixed-sessions",
            "mixed batches beside a session for each of 8 customers",
            mixed,
            (*served, "--shape", "8x128"),
            60,
            flag="-o",
            alike=True,
        ),
        Part(
            "report",
            "a report of `bench` beside torch, fp16",
            report,
            ("--reports", "fp16", "--seconds", "5"),
            230,
            flag="-o",
            endings=tuple(f"_fp16{kind}" for kind in both),
        ),
        Part(
            "report-more",
            "reports of `bench`: one customer in fp16, and fp32",
            report,
            ("--reports", "fp16_one_customer", "fp32", "--seconds", "5"),
            150,
            flag="-o",
            endings=tuple(f"_{name}{kind}" for name in ("fp16_one_customer", "fp32") for kind in both),
            alike=True,
        ),
    ]


def _quick(part: Part, device: str) -> Part:
    """The same part with tiny shapes on a device."""
    kind = part.kind
    seconds, options = QUICK[kind]
    by_device = ["--provider" if part.module in PROVIDED else "--device", device]
    if kind in ("swap", "mixed") and device == "cuda":
        by_device.append("--cuda-graph")
    if kind == "graph" and device == "cpu":
        # Compiling takes a minute of two cores.
        by_device.append("--no-compile")
    needs = QUICK_GRAPHS.get(kind, ())
    variants = ("--variants", *needs) if needs else ()
    return replace(part, options=(*by_device, *options.split(), *variants), seconds=seconds, needs=needs)


PROVIDED = ("benchmarks.swap", "benchmarks.mixed_batch", "benchmarks.gpu_report")
"""Scripts whose device is an execution provider."""

QUICK: dict[str, tuple[float, str]] = {
    "factorization": (5, "--case 2x96 1x160 --project 2x128 --rounds 2"),
    "graph": (25, "--shape tiny --quick"),
    "switchable": (30, "--shape tiny-mpnet --quick --no-compile"),
    "table": (
        20,
        "--model tiny --precision fp32 --customers 20000 --rank 64 --batch 8 --length 16 --runs 20 --warmup 2 "
        "--windows 8 --window 0.1 --swaps-per-second 200",
    ),
    "swap": (15, "--model tiny --rank 8 --length 16 --runs 20"),
    "training": (20, "--shape minilm --steps 2 --rounds 1 --batch-size 4 --max-length 16"),
    "fleet": (20, "--shape minilm --customers 2 --sample 1 --rounds 1 --rows 30 --epochs 1"),
    "decoding": (40, "--quick --parts steps"),
    "mixed": (25, "--model minilm --rank 8 --no-sessions --runs 5 --warmup 1 --shape 2x16"),
    "report": (30, "--model tiny --rank 8 --reports fp16 --batch 2 --length 16 --seconds 0.3 --peer"),
}
"""Seconds on two cores, and options, by the kind of the part."""

QUICK_GRAPHS = {
    "graph": MERGED_GRAPHS,
    "switchable": (PADDING_FREE, *(f"{setup}, {PADDING_FREE}" for setup in SETUPS)),
}


def failed_checks(part: Part, record: dict[str, Any]) -> list[str]:
    """Checks that failed although the benchmark itself went on without what they concern."""
    found = []
    for batch in record.get("batches", ()) if part.needs else ():
        place = f"{batch['batch']}x{batch['length']}"
        for name in part.needs:
            if name in batch.get("failed", {}):
                found.append(f"{place} {name}: {batch['failed'][name]}")
            elif name not in batch.get("device_ms", {}):
                found.append(f"{place} {name}: was not exported, see the log")
    for subject in record.get("subjects", ()):
        parity = subject.get("parity")
        if parity and not parity["passed"]:
            found.append(f"{subject['name']}: max abs error {parity['max_abs_error']:.1e} > {parity['bound']:.1e}")
    return found
