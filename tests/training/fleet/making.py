"""A base without dropout, customers with random rows, and the single run that a fleet is held against."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.training.settings import TrainSettings
from tests.tiny import LABELS, SENTENCES
from tests.tolerances import Tolerance

AS_ALONE: Tolerance = {"rtol": 1e-4, "atol": 2e-5}
"""A customer in a fleet against itself alone, values up to 0.5: sums in another order, 1e-7 of a gradient, which Adam's
division by the gradient's size carries through every step. 8e-7 was seen after 36 steps; a wrong batch, rate or
neighbour shows in the second digit."""

AS_ALONE_AFTER_LONG: Tolerance = {"rtol": 1e-3, "atol": 2e-4}
"""The same after 40 epochs: a processor whose sums depend on the number of rows was seen to be 7e-5 off by then."""

ON_GPU: Tolerance = {"rtol": 1e-2, "atol": 1e-3}
"""The same on a GPU in fp32, where sums over rows are in no fixed order and matrix products differ by shape."""

SIZES = ((16, 8), (7, 5), (30, 6), (1, 2), (33, 12))
"""Training and held-out rows of five customers."""

OWN_WAYS = ("run_digest", "loss", "metrics", "tuned_metrics", "baseline", "trunk_cache")
"""Of a training record: what is compared by itself, and what says how a run went and not what came out."""


def without_dropout(base: Path, folder: Path) -> Path:
    """A copy of a base that answers the same in training: two runs that draw other masks could not agree."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_rows(count: int, seed: int, labels: Sequence[str] = LABELS) -> list[tuple[str, str]]:
    """Texts of two to eight words of the tiny model with any labels."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = random.permutation(SENTENCES[random.integers(len(SENTENCES))].split())
        rows.append((" ".join(words[: random.integers(2, 9)]), labels[random.integers(len(labels))]))
    return rows


def write_rows(path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = ("text", "label")) -> None:
    """A TSV file."""
    path.write_text("\n".join("\t".join(row) for row in [columns, *rows]) + "\n", encoding="utf-8")


def write_lists(path: Path, count: int, seed: int, labels: Sequence[str]) -> None:
    """JSON lines of texts with any number of labels each, none of them too."""
    random = np.random.default_rng(seed + 1000)
    rows = [
        {"text": text, "label": [label for label in labels if random.random() < 0.4]}
        for text, _ in random_rows(count, seed)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_folders(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> list[str]:
    """`data/NAME.tsv` and `held-out/NAME.tsv` for each customer; returns their names."""
    names = [f"customer-{number}" for number in range(len(sizes))]
    for place in ("data", "held-out"):
        (folder / place).mkdir()
    for number, (name, counts) in enumerate(zip(names, sizes, strict=True)):
        for place, count, seed in zip(("data", "held-out"), counts, (number, 100 + number), strict=True):
            write_rows(folder / place / f"{name}.tsv", random_rows(count, seed))
    return names


def settings_of(**changes: object) -> TrainSettings:
    """Short runs of small batches on the CPU."""
    short = {"device": "cpu", "epochs": 6, "batch_size": 4, "max_length": 16, "patience": 2, "head_learning_rate": 0.01}
    return TrainSettings(**short | changes)  # type: ignore[arg-type]


def check_same(found: Coefficients, alone: Coefficients, tolerance: Tolerance = AS_ALONE) -> None:
    """Two runs of a customer agree in all that they learnt, up to the tolerance, and in what they recorded."""
    np.testing.assert_allclose(found.values, alone.values, **tolerance)
    assert found.head.keys() == alone.head.keys()
    for name, array in alone.head.items():
        np.testing.assert_allclose(found.head[name], array, **tolerance)
    assert (found.labels, found.task) == (alone.labels, alone.task)
    assert len(found.thresholds) == len(alone.thresholds)
    np.testing.assert_allclose(found.thresholds, alone.thresholds, **tolerance)
    names = (found.training.keys() | alone.training.keys()) - set(OWN_WAYS)
    pairs = {name: (found.training.get(name), alone.training.get(name)) for name in sorted(names)}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    assert not different, f"fleet and alone differ: {different}"
    for name in ("metrics", "baseline", "tuned_metrics"):
        one, two = found.training.get(name, {}), alone.training.get(name, {})
        assert one.keys() == two.keys()
        # By name: a file has them in another order.
        np.testing.assert_allclose([one[key] for key in two], list(two.values()), **AS_ALONE)
    np.testing.assert_allclose(found.training["loss"], alone.training["loss"], **AS_ALONE)
