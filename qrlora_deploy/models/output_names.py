"""Names of a model's outputs, as `id2label` of a config.json gives them. Needs neither PyTorch nor transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qrlora_deploy.errors import FileFormatError


def output_names(file: Path, names: Mapping[int, Any]) -> tuple[str, ...]:
    """The names in the order of the outputs, without blanks at their ends, as labels of data are read.

    Args:
        file: that has them, for messages.
        names: by the number of the output.

    Raises:
        FileFormatError: they are not counted from 0, are no text, are empty, or two are alike.
    """
    if sorted(names) != list(range(len(names))) or not names:
        shown = ", ".join(str(key) for key in sorted(names)[:4])
        raise FileFormatError(f"{file}: id2label must count the outputs from 0 on; it has {shown or 'none'}")
    found: dict[str, int] = {}
    for index in range(len(names)):
        name = _name(file, index, names[index])
        if name in found:
            raise FileFormatError(f"{file}: id2label calls the outputs {found[name]} and {index} both {name!r}")
        found[name] = index
    return tuple(found)


def _name(file: Path, index: int, value: Any) -> str:
    name = str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    if not name or not _is_unicode(name):
        raise FileFormatError(f"{file}: id2label gives the output {index} no usable name: {value!r}")
    return name


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
