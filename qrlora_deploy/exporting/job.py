"""What every exporter is asked for, whatever it writes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples
    from qrlora_deploy.formats.basis import Basis
    from qrlora_deploy.formats.coefficients import Coefficients
    from qrlora_deploy.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class ExportJob:
    """What is to be exported, and where to.

    Attributes:
        checkpoint: the base.
        basis: of that base.
        output: a new file or folder, as `Exporter.output` says.
        coefficients: the customer; None for a form that serves all customers.
        progress: called with a description, the steps done and all steps.
    """

    checkpoint: "Checkpoint"
    basis: "Basis"
    output: Path
    coefficients: "Coefficients | None" = None
    progress: Callable[[str, int, int], None] | None = None


@dataclass(frozen=True)
class Original:
    """What an export was made from, to compare it with anew.

    Attributes:
        checkpoint: the base.
        basis: of that base.
        coefficients: the customer to compare with.
        texts: to compare on; None: what comes with the project.
    """

    checkpoint: "Checkpoint"
    basis: "Basis"
    coefficients: "Coefficients"
    texts: "Examples | None" = None
