"""From the records to a Markdown table."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

from benchmarks.glue.records import Record
from benchmarks.tenants.customers import ALWAYS_JUDGED_ON, POOL, Split
from benchmarks.tenants.methods import METHODS
from benchmarks.tenants.plan import BASES, START

LORA = "lora"


def render(records: Iterable[Record]) -> str:
    """One table for each model: mean and standard deviation over the splits, in percent."""
    rows = list({record["key"]: record for record in records if "error" not in record}.values())
    lines = ["# One basis for many customers", "", _conditions(rows)]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += ["", f"## {model}", "", *_table(own), "", *_placement(own)]
    return "\n".join(lines) + "\n"


def _conditions(rows: Sequence[Record]) -> str:
    if not rows:
        return "No finished runs."
    settings = rows[0]["settings"]
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    versions = ", ".join(f"{name} {value}" for name, value in sorted(rows[0]["versions"].items()))
    return (
        "Accuracy on the test rows of nine customers, in percent, mean ± standard deviation over the splits. The "
        "encoder is the pretrained one; a customer's head is fitted to a quarter of its rows and frozen, the same for "
        f"all methods. {settings['epochs']} epochs, batch {settings['batch_size']}, at most "
        f"{settings['train_rows']} training rows of {settings['max_length']} tokens, "
        f"{'bf16' if settings['bf16'] else 'fp32'}. {devices}. {versions}."
    )


def _table(rows: Sequence[Record]) -> list[str]:
    columns = [
        "method",
        "coefficients",
        "rate",
        "domains",
        *ALWAYS_JUDGED_ON,
        "nine",
        "gain",
        "least gain",
        "of LoRA's",
    ]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    scores = {(row["split"], row["customer"], row["method"]): row for row in rows if "accuracy" in row}
    for name in (START, *METHODS):
        splits = [number for number in _splits(rows) if _whole(scores, number, name)]
        if not splits:
            continue
        mine = [row for row in rows if row["method"] == name and row["customer"] != POOL]
        numbers = "–" if name == START else f"{round(mean(row['trainable_parameters'] for row in mine)):,}"
        rate = "–" if name == START else f"{mine[0]['learning_rate']:.3g}"
        title = "the start itself" if name == START else METHODS[name].title
        groups = [_domains(number) for number in splits]
        cells = [_cell([_mean(scores, n, group, name) for n, group in zip(splits, groups, strict=True)])]
        cells += [_cell([_mean(scores, n, (customer,), name) for n in splits]) for customer in ALWAYS_JUDGED_ON]
        cells.append(_cell([_mean(scores, n, Split(n).judged_on, name) for n in splits]))
        gains = [_gain(scores, number, name) for number in splits]
        least = min(_least(scores, number, name) for number in splits)
        shares = [
            100 * _gain(scores, number, name) / _gain(scores, number, LORA)
            for number in splits
            if _whole(scores, number, LORA) and name != START
        ]
        shown = f" ({len(splits)})" if len(splits) < len(_splits(rows)) else ""
        lines.append(
            "| "
            + " | ".join(
                [title + shown, numbers, rate, *cells, _cell(gains), f"{least:+.1f}", _cell(shares) if shares else "–"]
            )
            + " |"
        )
    return lines


Scores = dict[tuple[int, str, str], Record]


def _splits(rows: Sequence[Record]) -> list[int]:
    return sorted({row["split"] for row in rows})


def _domains(number: int) -> tuple[str, ...]:
    return tuple(name for name in Split(number).judged_on if name not in ALWAYS_JUDGED_ON)


def _whole(scores: Scores, number: int, method: str) -> bool:
    return all((number, customer, method) in scores for customer in Split(number).judged_on)


def _accuracy(scores: Scores, number: int, customer: str, method: str) -> float:
    return 100 * float(scores[number, customer, method]["accuracy"])


def _mean(scores: Scores, number: int, customers: Sequence[str], method: str) -> float:
    return mean(_accuracy(scores, number, customer, method) for customer in customers)


def _gain(scores: Scores, number: int, method: str) -> float:
    customers = Split(number).judged_on
    return _mean(scores, number, customers, method) - _mean(scores, number, customers, START)


def _least(scores: Scores, number: int, method: str) -> float:
    return min(
        _accuracy(scores, number, customer, method) - _accuracy(scores, number, customer, START)
        for customer in Split(number).judged_on
    )


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def _placement(rows: Sequence[Record]) -> list[str]:
    """Where each basis has its directions, by kind of layer; of bases of a pool those of the first split."""
    lines = ["| basis | directions of each kind of layer |", "| --- | --- |"]
    shown: set[str] = set()
    for row in rows:
        for name, basis in row["bases"].items() if row["method"] == BASES else ():
            if name not in shown and name != "full":
                shown.add(name)
                kinds = ", ".join(f"{kind} {count}" for kind, count in basis["kinds"].items())
                lines.append(f"| {name} | {kinds} |")
    return lines
