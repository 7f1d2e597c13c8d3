"""What every client is held against: PyTorch's greedy tokens. Needs NumPy alone, in whatever environment it runs."""

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Expected:
    """The folder that `preparing` made, and what was found in it.

    Args:
        folder: it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._record = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        self.base: str = self._record["base"]
        self.names: list[str] = self._record["names"]
        self.texts: list[str] = self._record["texts"]
        self.prompts: list[list[int]] = self._record["prompts"]
        self.padding: int = self._record["padding"]
        self.steps: int = self._record["steps"]
        self._results: dict[str, list[str]] = {}

    def compare(self, what: str, name: str, prompt: int, tokens: Sequence[int]) -> None:
        """Count an answer: equal up to the end of the text, or to where two tokens are as good as equal."""
        expected, sure = self._answer(name, prompt)
        equal = list(tokens)[:sure] == expected[:sure]
        line = "" if equal else f"{name}, prompt {prompt}: {list(tokens)[:sure]} and not {expected[:sure]}"
        self._results.setdefault(what, []).append(line)

    def note(self, what: str, problem: str = "") -> None:
        """Count something else; empty: it is right."""
        self._results.setdefault(what, []).append(problem)

    def report(self, *packages: str) -> None:
        """Print versions and results as JSON, and end with 1 where something differs."""
        self.report_with({package: version(package) for package in packages})

    def report_with(self, versions: dict[str, str]) -> None:
        """As `report`, with versions that were found otherwise."""
        lines = {what: [line for line in found if line] for what, found in self._results.items()}
        results = [
            {"what": what, "equal": len(found) - len(lines[what]), "of": len(found), "wrong": lines[what]}
            for what, found in self._results.items()
        ]
        print(json.dumps({"versions": versions, "results": results}))
        sys.exit(1 if any(lines.values()) else 0)

    def _answer(self, name: str, prompt: int) -> tuple[list[int], int]:
        """The tokens, and how many of them count."""
        answer: dict[str, Any] = self._record["answers"][name][prompt]
        tokens, sure = answer["tokens"], answer["sure"]
        ends = [place + 1 for place, token in enumerate(tokens) if token in self._record["ends"]]
        return tokens, min([sure, *ends])


def here() -> Expected:
    """Of the folder that is named on the command line."""
    return Expected(Path(sys.argv[1]))
