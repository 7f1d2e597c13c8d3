"""Every figure of the project that takes a GPU, by one command on a machine with one.

    python -m benchmarks.gpu -o results                        everything: about half an hour on an H200
    python -m benchmarks.gpu -o results --budget-seconds 570   as much as fits; the same again does the rest
    python -m benchmarks.gpu -o results --only table fleet
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu -o trial --device cpu --quick     tiny shapes, to see that everything runs

Each part is one of the other benchmarks in a process of its own, which checks its results before it
times anything. Its record is in the output folder as soon as it has ended, its log in `logs/`. A part whose
record is there and was made with the same options is not run again; remove the record to repeat it. A part
that fails stops no other. At the end the table of what was aimed at and found is printed, from the records
that are there, and written as `gpu.md`.

Exit code 0: every part that was asked for has run and its checks passed, whether or not an aim was missed;
1: one failed or is left to the next run, and a line names it; 2: bad input.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.gpu.page import render
from benchmarks.gpu.parts import Part, make_parts
from benchmarks.gpu.running import Ledger, run_part
from qrlora_deploy.errors import InputError, QrloraError

MARGIN_S = 5.0
"""Of a budget, kept for the table at the end."""


def run_parts(parts: Sequence[Part], ledger: Ledger, budget_s: float | None) -> None:
    """Run every part that is not done and fits; what came of each is in the ledger.

    Those that failed before come last, so that they take no other's time.

    Args:
        budget_s: seconds from now; a part that is expected to take more than is left does not begin, and one
            that takes more all the same is stopped.
    """
    end = None if budget_s is None else time.perf_counter() + budget_s - MARGIN_S
    for part in sorted(parts, key=lambda one: ledger.outcome(one) is not None):
        left_s = None if end is None else end - time.perf_counter()
        if ledger.done(part):
            print(f"{part.name}: its record is there", flush=True)
        elif left_s is not None and part.seconds > left_s:
            print(f"{part.name}: takes about {part.seconds:.0f} s, more than the {left_s:.0f} s left", flush=True)
        else:
            print(f"{part.name}: {part.title}, about {part.seconds:.0f} s", flush=True)
            outcome = run_part(part, ledger.folder, left_s)
            ledger.note(part, outcome)
            print(f"{part.name}: {outcome.reason or 'done'} after {outcome.seconds:.0f} s", flush=True)


def show_list(parts: Sequence[Part], output: Path | None) -> None:
    """Print names, expected seconds, state and command lines."""
    ledger = None if output is None or not output.is_dir() else Ledger(output)
    for part in parts:
        state = "" if ledger is None else _state(ledger, part)
        print(f"{part.name:20} {part.seconds:5.0f} s  {part.title}{state}")
        print(f"{'':29}python {shlex.join(part.command(output or Path('OUTPUT'))[1:])}")
    print(f"{'all':20} {sum(part.seconds for part in parts):5.0f} s")


def _state(ledger: Ledger, part: Part) -> str:
    outcome = ledger.outcome(part)
    if ledger.done(part) and outcome is not None:
        return f" [done in {outcome.seconds:.0f} s]"
    return f" [failed: {outcome.reason}]" if outcome is not None and outcome.reason else ""


def measure(plan: Sequence[Part], chosen: Sequence[Part], arguments: argparse.Namespace) -> int:
    """Run the chosen parts and print the table of the whole plan; returns the exit code.

    Raises:
        InputError: there is no such device, or the folder is not one of this benchmark.
    """
    if arguments.device == "cuda":
        # Here, as it takes seconds to import.
        from qrlora_deploy.training.settings import choose_device

        choose_device("cuda")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{arguments.output} cannot be made a folder: {error.strerror}") from error
    ledger = Ledger(arguments.output.resolve())
    run_parts(chosen, ledger, arguments.budget_seconds)
    text = render(plan, ledger, arguments.quick)
    (ledger.folder / "gpu.md").write_text(text, encoding="utf-8")
    print(f"\n{text}", flush=True)
    code = 0
    for part in chosen:
        outcome = ledger.outcome(part)
        if not ledger.done(part):
            code = 1
            reason = f"failed: {outcome.reason}" if outcome and outcome.reason else "is left to the next run"
            print(f"{part.name} {reason}", file=sys.stderr)
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="folder of the records, the logs and gpu.md")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts, as --list names them")
    parser.add_argument("--list", action="store_true", help="print the parts with their seconds and commands")
    parser.add_argument("--budget-seconds", type=float, help="begin no part that is expected to take longer than that")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few runs; no figures of the project")
    found = parser.parse_args(arguments)
    if found.output is None and not found.list:
        parser.error("-o is needed: the folder of the records, or --list")
    if found.device == "cpu" and not found.quick:
        parser.error("--device cpu is for --quick alone: these are figures of a GPU")
    return found


def _choose(parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """The parts that were asked for.

    Raises:
        InputError: naming those that there are not.
    """
    known = [part.name for part in parts]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise InputError(f"--only {' '.join(unknown)}: no such part; there are {', '.join(known)}")
    return [part for part in parts if not names or part.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report."""
    options = _parse(arguments)
    try:
        plan = make_parts(options.device, options.quick)
        chosen = _choose(plan, options.only)
        if options.list:
            show_list(chosen, options.output)
            return 0
        return measure(plan, chosen, options)
    except QrloraError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code


def _stop(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    # So that a part that runs is stopped with this process.
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
