"""The standard streams as every command expects them: there, and able to take any name of a file."""

import io
import os
import sys

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
"""In the order of their descriptors."""


def prepare_streams() -> None:
    """Give a stream that was closed (`>&-`, `<&-`) the null device, and let the others write what they cannot show.

    Python has None for a closed stream. Its descriptor is filled too: the next file that is opened
    would get the number, and a library's message would go into that file.
    """
    for number in range(len(STREAMS)):
        _fill(number)
    for name, mode in STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123 - lives to the end
            setattr(sys, name, stream)
        # Names of files need not be text; what the stream cannot show is written as an escape.
        if mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fill(number: int) -> None:
    """Open the null device as a descriptor, unless somebody has it."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
