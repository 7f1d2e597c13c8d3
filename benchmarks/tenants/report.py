"""From the records to a Markdown table."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import mean, stdev

from benchmarks.glue.records import Record
from benchmarks.tenants.customers import ALWAYS_JUDGED_ON, Split
from benchmarks.tenants.methods import METHODS
from benchmarks.tenants.plan import BASES, START

LORA = "lora"

Scores = dict[tuple[int, str, str], Record]
"""By split, customer and method."""


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
    numbers = sorted({number for number, _, _ in scores})
    for name in (START, *METHODS):
        splits = [number for number in numbers if _whole(scores, number, name)]
        if splits:
            few = f" ({len(splits)})" if len(splits) < len(numbers) else ""
            cells = [_title(name) + few, *_size(scores, splits[0], name), *_results(scores, splits, name)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _title(name: str) -> str:
    return "the start itself" if name == START else METHODS[name].title


def _size(scores: Scores, number: int, name: str) -> list[str]:
    """How many coefficients a customer of a split has on average, and their rate."""
    if name == START:
        return ["0", "–"]
    found = [scores[number, customer, name] for customer in Split(number).judged_on]
    return [f"{round(mean(row['trainable_parameters'] for row in found)):,}", f"{found[0]['learning_rate']:.3g}"]


def _results(scores: Scores, splits: Sequence[int], name: str) -> list[str]:
    groups: list[Callable[[int], tuple[str, ...]]] = [
        _domains,
        *(partial(_only, customer) for customer in ALWAYS_JUDGED_ON),
        _all,
    ]
    cells = [_cell([_mean(scores, number, group(number), name) for number in splits]) for group in groups]
    if name == START:
        return [*cells, "–", "–", "–"]
    gains = {number: _gain(scores, number, name) for number in splits}
    others = {number: _gain(scores, number, LORA) for number in splits if _whole(scores, number, LORA)}
    shares = [100 * gains[number] / other for number, other in others.items() if other > 0]
    least = min(_least(scores, number, name) for number in splits)
    return [*cells, _cell(list(gains.values())), f"{least:+.1f}", f"{_cell(shares)} %" if shares else "–"]


def _domains(number: int) -> tuple[str, ...]:
    return tuple(name for name in Split(number).judged_on if name not in ALWAYS_JUDGED_ON)


def _only(customer: str, _: int) -> tuple[str, ...]:
    return (customer,)


def _all(number: int) -> tuple[str, ...]:
    return Split(number).judged_on


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
