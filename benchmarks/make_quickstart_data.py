"""Make the data that comes with the quickstart from the CLINC150 data set, one folder per domain.

    python benchmarks/make_quickstart_data.py SOURCE_FOLDER [-o qrlora_deploy/data/clinc150]

SOURCE_FOLDER holds `<domain>/{train,dev,test}.tsv` with the columns text and label. The same source
always gives the same bytes. Writes `general.tsv` and, for every customer, `<domain>.train.tsv` and
`<domain>.test.tsv`.
"""

import argparse
import hashlib
import sys
from collections import defaultdict
from pathlib import Path

from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.data.sample import CUSTOMERS, FOLDER, GENERAL
from qrlora_deploy.io.files import atomic_file

ROWS_PER_INTENT = 10
HEADER = "text\tlabel"

Row = tuple[str, str]


def read_rows(path: Path) -> list[Row]:
    """Text and label of every row."""
    examples = read_examples(path)
    return list(zip(examples.texts, map(str, examples.labels), strict=True))


def read_part(source: Path, part: str) -> dict[str, list[Row]]:
    """The rows of one part, "train", "dev" or "test", by domain; out-of-scope text is left out."""
    folders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("_"))
    return {folder.name: read_rows(folder / f"{part}.tsv") for folder in folders}


def sample_general(train: dict[str, list[Row]], held_out: set[str]) -> list[Row]:
    """`ROWS_PER_INTENT` training rows of every intent, those with the smallest digests: an order
    that depends neither on the files nor on a random generator."""
    by_label: dict[str, set[str]] = defaultdict(set)
    for rows in train.values():
        for text, label in rows:
            if text not in held_out:
                by_label[label].add(text)
    return [
        (text, label) for label in sorted(by_label) for text in sorted(by_label[label], key=_digest)[:ROWS_PER_INTENT]
    ]


def write_rows(rows: list[Row], path: Path) -> None:
    """Write a TSV file with LF line ends."""
    lines = [HEADER, *(f"{text}\t{label}" for text, label in rows)]
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def make(source: Path, output: Path) -> None:
    """Write all files into `output`."""
    train, dev, test = (read_part(source, part) for part in ("train", "dev", "test"))
    held_out = {text for part in (dev, test) for rows in part.values() for text, _ in rows}
    output.mkdir(parents=True, exist_ok=True)
    write_rows(sample_general(train, held_out), output / GENERAL)
    for name in CUSTOMERS:
        write_rows([row for row in train[name] if row[0] not in held_out], output / f"{name}.train.tsv")
        write_rows(test[name], output / f"{name}.test.tsv")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> int:
    """Parse, make, print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with one folder per domain")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder to write into")
    options = parser.parse_args()
    make(options.source, options.output)
    for path in sorted(options.output.glob("*.tsv")):
        print(f"{path.name}  {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
