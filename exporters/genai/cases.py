"""What the model of another runtime must answer: rows of any decoder's check, padded on either side."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from exporters.genai.building import Base
from exporters.onnx.decoder.reference import SLOTS, choose_rows, customers_of, lend, make_case
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE, TableLayout
from qrlora_deploy.runtime.verification.masked import MASK
from qrlora_deploy.runtime.verification.parity import Case


def make_cases(job: ExportJob, base: Base, texts: Sequence[str], table_dtype: str, one_customer: bool) -> list[Case]:
    """PyTorch's answers, for rows padded on the right and for the same ones padded on the left.

    Args:
        job: base, basis and, where one is folded in, the customer.
        base: what is known of the base.
        texts: of the rows.
        table_dtype: of the coefficient table.
        one_customer: all rows have one, in the only row of the table.
    """
    rows = choose_rows(base.tokenizer, texts, base.positions, base.padding)
    layout = TableLayout(list(job.basis.ranks.values()), table_dtype)
    slots = (1,) * len(SLOTS) if one_customer else SLOTS
    with lend(job.checkpoint.load_model(attn_implementation="eager"), job.basis) as forward:
        if job.coefficients is not None:
            case = make_case(forward, rows, job.coefficients.values[None], None, (0,) * len(SLOTS))
        else:
            case = make_case(forward, rows, customers_of(forward, rows, job.basis.total_rank), layout, slots)
    if one_customer:
        table = {TABLE: case.inputs[TABLE][1:2]}
        case = replace(case, inputs={name: case.inputs[name] for name in case.inputs if name != SLOT} | table)
    return [case, padded_left(case)]


def padded_left(case: Case) -> Case:
    """The case with the padding of each row before its tokens."""
    mask = case.inputs[MASK]
    gaps = (mask == 0).sum(axis=1)

    def moved(array: np.ndarray) -> np.ndarray:
        return np.stack([np.roll(row, gap) for row, gap in zip(array, gaps, strict=True)])

    inputs = case.inputs | {name: moved(case.inputs[name]) for name in ("input_ids", MASK)}
    return replace(case, name="left padding", inputs=inputs)
