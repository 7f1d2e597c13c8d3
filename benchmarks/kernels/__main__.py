"""Ask ONNX Runtime's kernels what their documentation does not say, and print guesses beside answers.

    python -m benchmarks.kernels --device cuda --out FILE
    python -m benchmarks.kernels --device cpu

Every guess stands in the code and was written before the first run. No question has an input of which the kernel may
read or write outside of its memory: what ONNX Runtime bounds itself is asked, and nothing else.
"""

import argparse
import fnmatch
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.common.measuring import environment
from benchmarks.kernels import attention, memory, products
from benchmarks.kernels.trial import WRONG, Place, Trial
from qrlora_deploy.io.files import write_json
from qrlora_deploy.runtime.sessions.session import check_provider


def ask_all(provider: str, pattern: str) -> list[dict[str, Any]]:
    """A record for every question at every place."""
    trials: list[Trial] = [*attention.trials(), *products.trials(), *memory.trials()]
    return [
        _record(trial, place)
        for trial in trials
        if fnmatch.fnmatch(f"{trial.operator}: {trial.question}", f"*{pattern}*")
        for place in trial.places(provider)
    ]


def _record(trial: Trial, place: Place) -> dict[str, Any]:
    guess = trial.guesses.get(str(place), trial.guesses[place.provider])
    answer = trial.answer(place)
    return {
        "operator": trial.operator,
        "question": trial.question,
        "place": str(place),
        "guess": guess,
        "answer": answer,
        "guessed": answer.startswith(guess) and WRONG not in answer,
    }


def print_table(records: list[dict[str, Any]]) -> None:
    """Each answer once; of attention's kernels those that answer as ONNX Runtime's choice does are left out."""
    chosen: dict[tuple[str, str, str], str] = {}
    for record in records:
        key = (record["operator"], record["question"], record["place"].partition(" ")[0])
        first = chosen.setdefault(key, record["answer"])
        if " " in record["place"] and record["answer"] == first:
            continue
        mark = " " if record["guessed"] else "*"
        place = f"{record['operator']}: {record['question']}"
        print(f"{mark} {place:78} {record['place']:15} {record['guess']:14} {record['answer']}")


def main() -> None:
    """Parse, ask, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", default="", help="questions that contain this; * stands for anything")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    check_provider(arguments.device)
    records = [record for name in sorted({"cpu", arguments.device}) for record in ask_all(name, arguments.only)]
    print(f"ONNX Runtime {onnxruntime.__version__}; * is where the guess was wrong")
    print_table(records)
    if arguments.out:
        record = {"onnxruntime": onnxruntime.__version__, "answers": records}
        write_json(arguments.out, record | {"environment": environment(arguments.device)})
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
