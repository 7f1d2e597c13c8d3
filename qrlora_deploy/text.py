"""Text from files and libraries made safe to print."""

MAX_MESSAGE = 480
"""Characters of a message: a name in a hostile file may be megabytes long."""


def one_line(text: str) -> str:
    """`text` on one line, control characters written out: names and labels come from files."""
    flat = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in flat)


def shortened(text: str, limit: int = MAX_MESSAGE) -> str:
    """`text` on one line of at most `limit` characters.

    What is cut is the middle: a message begins with the file and ends with the remedy.
    """
    # Writing out a character takes ten at most, so this much is enough of each end.
    flat = one_line(text if len(text) <= 2 * limit else f"{text[:limit]} ... {text[-limit:]}")
    if len(flat) <= limit:
        return flat
    half = (limit - 5) // 2
    return f"{flat[:half]} ... {flat[-half:]}"
