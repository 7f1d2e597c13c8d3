"""A rule of another release: it is shown and kept, and cannot be computed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np

from qrlora_deploy.errors import InputError, shortened

MAX_SHOWN = 120
"""Characters of parameters that are shown: they come from a file."""


@dataclass(frozen=True)
class UnknownRule:
    """What a basis file says of a rule that this release does not have; everything but `choose` works.

    Attributes:
        kind: its name.
        parameters: its parameters, plain JSON values.
    """

    kind: str
    parameters: dict[str, Any]

    per_target: ClassVar[bool] = False

    def __str__(self) -> str:
        shown = json.dumps(self.parameters, sort_keys=True) if self.parameters else ""
        return shortened(f"{self.kind} {shown}".strip(), MAX_SHOWN) + ", unknown to this version"

    def choose(self, diagonals: Mapping[str, np.ndarray]) -> NoReturn:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"the rank rule {shortened(self.kind, MAX_SHOWN)!r} is unknown to this version and cannot be computed; "
            f"update qrlora-deploy, or choose tau or a rank"
        )
