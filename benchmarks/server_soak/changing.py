"""What changes under a server that answers: customers' versions and the file of keys."""

import shutil
from pathlib import Path

import numpy as np

from benchmarks.server_soak.place import CUSTOMERS, VERSIONS, Place, name_of
from benchmarks.server_soak.told import now
from qrlora_deploy.serving.keys_file import read_keys, with_key, write_keys


class Swaps:
    """Gives customers one version after the other.

    Args:
        place: of the soak.

    Attributes:
        count: of swaps.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._replaced_s = place, place.replaced_s()
        self._random, self._current, self.count = np.random.default_rng(1), [0] * CUSTOMERS, 0

    def swap(self) -> None:
        """Another version of a customer drawn at random goes live."""
        customer = int(self._random.integers(CUSTOMERS))
        before = self._current[customer]
        after = (before + 1) % VERSIONS
        target = self._place.customers / f"{name_of(customer)}.safetensors"
        # Before it is there: a server may be quick.
        self._replaced_s[customer, after] = 0
        temporary = target.with_suffix(".new")
        shutil.copy(self._place.version(customer, after), temporary)
        temporary.replace(target)
        self._replaced_s[customer, before] = now()
        self._current[customer] = after
        self.count += 1


def change_keys(place: Place) -> None:
    """Write the file of keys anew, with another key that nobody uses in place of the last such one."""
    file = read_keys(place.keys)
    file = file.model_copy(update={"keys": [key for key in file.keys if key.note != "unused"]})
    file, _, _ = with_key(file, [name_of(0)], [], note="unused")
    write_keys(file, place.keys)


def lines_of(log: Path) -> dict[str, int]:
    """How often each kind of line is in a log: without times and numbers."""
    counts: dict[str, int] = {}
    for line in log.read_text(errors="replace").splitlines():
        words = line.split(" ", 2)[-1] if line[:2] == "20" else line
        kind = "".join("#" if letter.isdigit() else letter for letter in words)[:200]
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1])[:30])
