"""Hook of mkdocs: pages are read from a copy that lies as in the repository, so that one link serves both.

Pages link to records under `benchmarks/results/`, to scripts and to the README, which lie outside of `docs/`.
"""

import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TAKEN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "benchmarks/results", "qrlora_deploy/data/clinc150")


def on_config(config: Any) -> Any:
    """Copy what pages show or link to into `docs_dir`."""
    source = Path(config.docs_dir)
    shutil.rmtree(source, ignore_errors=True)
    for name in TAKEN:
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place)
        else:
            shutil.copy(ROOT / name, place)
    return config
