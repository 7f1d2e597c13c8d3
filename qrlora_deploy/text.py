"""Text from files and libraries made safe to print."""


def one_line(text: str) -> str:
    """`text` on one line, control characters written out: names and labels come from files."""
    flat = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in flat)
