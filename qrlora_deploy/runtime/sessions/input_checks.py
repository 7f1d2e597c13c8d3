"""Whether arrays are what a graph takes: it would read wrong rows of its tables without an error."""

from collections.abc import Mapping, Sequence

import numpy as np

from qrlora_deploy.errors import MalformedInputError


def check_inputs(inputs: Mapping[str, np.ndarray], names: Sequence[str], rows: int) -> None:
    """Make sure that a batch can be answered.

    Args:
        inputs: arrays by name.
        names: of the text inputs.
        rows: as many as there are customers.

    Raises:
        MalformedInputError: inputs are missing, empty, no int64 arrays `[rows, length]`, or negative.
    """
    missing = [name for name in names if name not in inputs]
    if missing:
        raise MalformedInputError(f"the inputs lack {', '.join(missing)}")
    for name in names:
        _check_array(name, inputs[name])
    shapes = {inputs[name].shape for name in names}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or next(iter(shapes))[0] != rows:
        raise MalformedInputError(f"{rows} customers need inputs of one shape [{rows}, length], not {sorted(shapes)}")
    if 0 in next(iter(shapes)):
        raise MalformedInputError("there is nothing to answer: the inputs are empty")
    for name in names:
        # The graph takes them for rows from the end of its table, without an error.
        if inputs[name].min() < 0:
            raise MalformedInputError(f"the input {name} has a negative number")


def _check_array(name: str, array: object) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.int64:
        found = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise MalformedInputError(f"the input {name} must be an array of int64, not {found}")
