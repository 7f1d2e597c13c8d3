"""What was found of each family, as one JSON file a family in a folder."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.models.families import FAMILIES, Family


def result_file(folder: Path, family: Family) -> Path:
    """Where the result of a family is."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', family.name.lower())}.json"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results that are there, in the order of the families."""
    files = [result_file(folder, family) for family in FAMILIES]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
