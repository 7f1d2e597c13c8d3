"""Which families of models work, from `factorize` to every kind of bundle.

    python -m benchmarks.models -o benchmarks/results/models --page docs/models.md

Each family is a model of two layers with random weights and the real config of its kind. Its answers are held
against PyTorch with weights `W + (Q * c) @ R` that the benchmark computes itself. A family that has a JSON in the
output folder is not run again; `--again NAME` runs it anew, and without families left only the page is written.
"""

import argparse
import gc
import tempfile
from importlib import import_module
from pathlib import Path

import transformers

from benchmarks.models.families import FAMILIES
from benchmarks.models.page import write_page
from benchmarks.models.results import read_results, result_file
from benchmarks.models.whole import try_family
from qrlora_deploy.io.files import write_json

PACKAGES = ("torch", "transformers", "onnxscript", "onnxruntime")


def main() -> None:
    """Run what has no result yet and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of one JSON a family")
    parser.add_argument("--page", type=Path, help="Markdown page to write at the end")
    parser.add_argument("--again", action="append", default=[], help="name of a family to run once more; repeatable")
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("N", "OF"), help="every OFth family alone"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    first, step = arguments.part
    for family in FAMILIES[first::step]:
        file = result_file(arguments.output, family)
        if family.name in arguments.again or not file.exists():
            with tempfile.TemporaryDirectory() as folder:
                found = try_family(family, Path(folder))
            write_json(file, {"family": family.name, "versions": versions(), **found})
            print(f"{family.name}: {found.get('refused') or found.get('fault') or 'works'}", flush=True)
            gc.collect()
    if arguments.page:
        write_page(arguments.page, read_results(arguments.output))


def versions() -> dict[str, str]:
    """Of the packages that decide what works."""
    return {name: str(import_module(name).__version__) for name in PACKAGES}


if __name__ == "__main__":
    main()
