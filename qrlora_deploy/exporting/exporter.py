"""What an exporter is: how it is called, which options it has, what it writes and how that is checked again.

`docs/extending.md` shows how another package adds one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from qrlora_deploy.errors import CheckFailed
from qrlora_deploy.exporting.job import ExportJob, Original


class Exporter(Protocol):
    """Writes a form of a base that runs without it.

    The module that holds one is imported for `export --help`, so it imports torch and the like in `export` alone.

    Attributes:
        name: what `--format` calls it; the name of its entry point.
        options: a frozen dataclass whose fields are made by `exporting.options.option`, all with defaults. They become
            options of `export`; `__post_init__` refuses what does not go together by an `InputError`.
        output: whether it writes one file or a folder.
        needs_customer: True: it writes one customer. False: it writes a form for all customers. None: it does either,
            as a customer is given or not.
        shown: names of what `export` returns that a person sees; `--json` prints all.
    """

    name: str
    options: type[Any]
    output: Literal["file", "folder"]
    needs_customer: bool | None
    shown: Sequence[str]

    def export(self, job: ExportJob, options: Any) -> Mapping[str, Any]:
        """Write `job.output` whole or not at all; returns plain JSON values that say what was written.

        Args:
            job: what is to be exported. It has a customer where the exporter needs one.
            options: an instance of `self.options`.

        Raises:
            QrloraError: one line that names the file or option, what is wrong and what would be right.
        """


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check of an export.

    Attributes:
        facts: what was measured, plain JSON values.
        failure: what is out of bounds; None: the check passed.
    """

    facts: Mapping[str, Any]
    failure: CheckFailed | None = None


@runtime_checkable
class Verifier(Protocol):
    """An exporter that can check later what it wrote."""

    def verify(self, output: Path, original: Original | None, provider: str) -> Verdict:
        """Check what lies at `output`.

        Args:
            output: what `export` wrote.
            original: what to compute the answers from anew; None: compare with what the export itself carries.
            provider: execution provider of ONNX Runtime, "cpu", "cuda" or "tensorrt", where it runs there.

        Raises:
            InputError: there is nothing to check, or it was made from something else.
        """
