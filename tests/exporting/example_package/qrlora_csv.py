"""The exporter "csv": a customer's coefficients as a table, a line for each target and direction."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qrlora_deploy.errors import CheckFailed, InputError, argument
from qrlora_deploy.exporting.exporter import Verdict
from qrlora_deploy.exporting.job import ExportJob, Original
from qrlora_deploy.exporting.options import option

HEADER = ["target", "direction", "coefficient"]


@dataclass(frozen=True)
class CsvOptions:
    """Options of the exporter "csv".

    Attributes:
        separator: between the columns, "comma" or "semicolon".
        digits: of a coefficient; 9 give back every fp32 number.
        no_header: leave the line of names out.
    """

    separator: str = option("comma", "Between the columns.", choices=("comma", "semicolon"))
    digits: int = option(9, "Of a coefficient; 9 give back every fp32 number.", least=1, most=17)
    no_header: bool = option(False, "Leave the line of names out.")

    def __post_init__(self) -> None:
        """Refuse what no table can be, by an InputError: options may come from Python as well."""
        if not 1 <= self.digits <= 17:
            raise InputError(f"{argument('digits')} must be between 1 and 17, not {self.digits}")


class CsvExporter:
    """A customer as a table."""

    name = "csv"
    options = CsvOptions
    output: Literal["file", "folder"] = "file"
    needs_customer: bool | None = True
    shown = ("kind", "rows")

    def export(self, job: ExportJob, options: CsvOptions) -> Mapping[str, Any]:
        """Write the table; it takes its place when it is whole."""
        from qrlora_deploy.io.files import atomic_file
        from qrlora_deploy.io.outputs import check_replaceable

        assert job.coefficients is not None  # `needs_customer` says so
        check_replaceable(job.output, "table of coefficients", _is_table)
        lines = list(_lines(job, options.digits))
        with atomic_file(job.output) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter={"comma": ",", "semicolon": ";"}[options.separator])
            writer.writerows(lines if options.no_header else [HEADER, *lines])
        return {"kind": "csv", "rows": len(lines), "coefficients_digest": job.coefficients.digest}

    def verify(self, output: Path, original: Original | None, provider: str) -> Verdict:
        """Compare the table with the coefficients, which the table alone does not have."""
        if original is None:
            raise InputError(f"{output} carries nothing to compare with; give {argument('coefficients')}")
        found = [float(row[2]) for row in _rows(output) if row != HEADER]
        expected = original.coefficients.values.tolist()
        wrong = sum(abs(one - other) > 1e-6 * abs(other) for one, other in zip(found, expected, strict=False))
        wrong += abs(len(found) - len(expected))
        failure = CheckFailed(f"{output}: {wrong} of {len(expected)} coefficients differ") if wrong else None
        return Verdict({"rows": len(found), "wrong": wrong}, failure)


def _lines(job: ExportJob, digits: int) -> Iterator[list[str]]:
    assert job.coefficients is not None
    for target, values in job.basis.split(job.coefficients.values).items():
        for direction, value in enumerate(values):
            yield [target, str(direction), f"{value:.{digits}g}"]


def _rows(file: Path) -> list[list[str]]:
    text = file.read_text(encoding="utf-8")
    return list(csv.reader(text.splitlines(), delimiter=";" if ";" in text else ","))


def _is_table(file: Path) -> bool:
    """Whether a file that is there holds what is written here: `-o` replaces nothing else."""
    try:
        return all(row == HEADER or float(row[2]) is not None for row in _rows(file))
    except (ValueError, IndexError):
        return False


EXPORTER = CsvExporter()
