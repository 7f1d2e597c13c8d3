"""Whether a decoder's exports give PyTorch's tokens in other runtimes.

    python -m benchmarks.foreign_decoders BASE --work FOLDER -o benchmarks/results/foreign_decoders.json

Exports of all kinds are made once, in FOLDER; each client has an environment of its own beside them, with the newest
packages that pip and npm find. A base and two made-up customers answer three prompts of different lengths, in one batch
where the client takes one. Equal means: every token up to the end of the text, unless the two likeliest ones are as
good as equal.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.foreign_decoders.environments import PYTHON, run_client
from benchmarks.foreign_decoders.preparing import prepare
from qrlora_deploy.io.files import write_json

CLIENTS = (*PYTHON, "transformers_js")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or hub name of a decoder")
    parser.add_argument("--work", type=Path, required=True, help="folder of exports and environments")
    parser.add_argument("--only", choices=CLIENTS, nargs="*", default=CLIENTS)
    parser.add_argument("--builder", default="auto", help="of the graphs, as of export --format genai")
    parser.add_argument("--targets", default="q,v", help="layers of the basis, comma between; all: all linear ones")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32, help="tokens of each answer")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    exported = given.work.resolve() / f"exported-{given.builder}"
    if not exported.is_dir():
        targets = () if given.targets == "all" else given.targets.split(",")
        prepare(given.base, exported, given.steps, targets, given.rank, given.builder)
    records = [_record(client, exported, given.work.resolve()) for client in given.only]
    print(table_of(records))
    if given.output:
        write_json(given.output, {"base": Path(given.base).name, "builder": given.builder, "clients": records})
    sys.exit(any(line["wrong"] for record in records for line in record["results"]))


def _record(client: str, exported: Path, place: Path) -> dict[str, Any]:
    done = run_client(client, exported, place)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if not last.startswith("{"):
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        failed = {"what": "it runs", "equal": 0, "of": 1, "wrong": [reason]}
        return {"client": client, "versions": {}, "results": [failed]}
    return {"client": client, **json.loads(last)}


def table_of(records: list[dict[str, Any]]) -> str:
    """Rows of a table in Markdown."""
    lines = ["| client | versions | what | equal |", "| --- | --- | --- | --- |"]
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        for result in record["results"]:
            lines.append(
                f"| {record['client']} | {versions} | {result['what']} | {result['equal']} of {result['of']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
