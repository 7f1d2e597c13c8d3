"""Blocks of rows that go to free rows of a table, of which most lie side by side."""

from collections.abc import Callable, Iterable

import numpy as np

from qrlora_deploy.errors import InputError

Block = dict[str, np.ndarray]
"""Rows `[n, width]` by input."""


def write_blocks(rows: np.ndarray, blocks: Iterable[Block], write: Callable[[list[tuple[int, Block]]], None]) -> None:
    """Hand over block after block, each in as few parts as lie side by side.

    Args:
        rows: `[count]` int64, the rows of the table, rising.
        blocks: together `count` rows.
        write: takes the parts of a block, each with its first row.

    Raises:
        InputError: there are more or fewer rows than `count`, or a block has not one number of rows.
    """
    done = 0
    for block in blocks:
        count = len(next(iter(block.values())))
        if any(len(values) != count for values in block.values()):
            raise InputError("a block has another number of rows for every input")
        if count == 0:
            continue
        numbers = rows[done : done + count]
        if len(numbers) < count:
            raise InputError(f"there are more rows than the {len(rows)} customers")
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        write(
            [
                (int(numbers[first]), {name: values[first:last] for name, values in block.items()})
                for first, last in zip((0, *breaks), (*breaks, count), strict=True)
            ]
        )
        done += count
    if done < len(rows):
        raise InputError(f"there are {done} rows for {len(rows)} customers")
