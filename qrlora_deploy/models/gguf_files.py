"""From a GGUF file to a checkpoint in safetensors, once: weights are read from safetensors alone everywhere else."""

from collections import Counter
from contextlib import redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers

from qrlora_deploy.errors import InputError, QrloraError, argument, library_errors
from qrlora_deploy.installation.parts import need
from qrlora_deploy.io.files import atomic_folder, digest_file, write_json
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.loading import quiet_transformers
from qrlora_deploy.version import __version__

MAGIC = b"GGUF"
RECORD = "conversion.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARD_SIZE = "4GB"
PROBE = [[1, 2, 3, 5, 8, 13]]


def convert_gguf(source: Path, output: Path, dtype: str = "fp32") -> dict[str, Any]:
    """Write the decoder of a GGUF file to the new folder `output`, with its tokenizer.

    Quantised weights become the numbers that they stand for, no others: what rounding took is not given back.

    Args:
        source: the file.
        output: a folder, which must not hold anything yet; nothing is left there on any error.
        dtype: of the weights that are written: "fp32", "fp16" or "bf16".

    Returns:
        What the folder holds as `conversion.json`: the digests of the file and of the checkpoint, how many tensors were
        stored in which type, versions; plain JSON values.

    Raises:
        MissingPartError: the package gguf is not installed.
        InputError: the file is none, transformers does not know its kind of model, or `output` is taken.
        QrloraError: the disk is full, or the checkpoint does not answer as the file does.
    """
    need("gguf", "a GGUF file")
    check_free_folder(output)
    _check_kind(source)
    if dtype not in DTYPES:
        raise InputError(f"{argument('dtype')} must be one of {', '.join(DTYPES)}, not {dtype}")
    stored = _stored_types(source)
    # Its bar cannot be asked away.
    with library_errors(f"{source} cannot be converted", InputError), quiet_transformers(), redirect_stderr(StringIO()):
        model, tokenizer = _read(source, DTYPES[dtype])
    expected = _answer(model)
    with atomic_folder(output) as folder:
        with quiet_transformers():
            model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
            tokenizer.save_pretrained(folder)
        written = Checkpoint(folder, str(output))
        if not _answers_so(written, source, DTYPES[dtype], expected):
            raise QrloraError(f"{output} would not answer as {source} does: the conversion went wrong")
        record = {
            "source": source.name,
            "source_digest": digest_file(source),
            "base_digest": written.digest,
            "architecture": written.architecture,
            "stored_types": stored,
            "dtype": dtype,
            "versions": {"qrlora-deploy": __version__, **{name: version(name) for name in ("gguf", "transformers")}},
        }
        write_json(folder / RECORD, record)
    return record


def _answers_so(written: Checkpoint, source: Path, dtype: torch.dtype, expected: torch.Tensor) -> bool:
    try:
        written.check_base()
        return torch.equal(_answer(written.load_model(dtype=dtype)), expected)
    except InputError as error:
        # What was written is not left: the file is what its reader knows.
        raise InputError(f"{source} cannot be converted: {str(error).removeprefix(f'{written.folder}: ')}") from error


def _check_kind(source: Path) -> None:
    try:
        with source.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or error}") from error
    if start != MAGIC:
        raise InputError(f"{source} is no GGUF file; `convert` reads these alone")


def _stored_types(source: Path) -> dict[str, int]:
    """How many tensors are stored in each type, by its name, such as Q4_1."""
    # Imported here: an extra of its own.
    from gguf import GGUFReader

    with library_errors(f"{source} is no whole GGUF file", InputError):
        return dict(sorted(Counter(tensor.tensor_type.name for tensor in GGUFReader(source).tensors).items()))


def _read(source: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model without what marks it as quantised, which `save_pretrained` would refuse, and its tokenizer."""
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, trust_remote_code=False)
    config = type(read.config).from_dict(
        {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    )
    with torch.device("meta"):
        model = type(read)(config)
    # The very tensors, not copies.
    model.load_state_dict(read.state_dict(), assign=True, strict=False)
    for name, buffer in read.named_buffers():
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path).register_buffer(attribute, buffer, persistent=False)
    model.tie_weights()
    model.generation_config = read.generation_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    # Transformers 4.57 reads every vocabulary into a class that begins each text with a token of its own; the property
    # cannot be set in later versions, which need not be told.
    change = getattr(getattr(type(tokenizer), "add_bos_token", None), "fset", None)
    if change is not None and tokenizer.add_bos_token and not _adds_bos(source):
        change(tokenizer, False)
    return model.eval(), tokenizer


def _adds_bos(source: Path) -> bool:
    """Whether texts begin with a token of their own: what the file says, else what is usual for its vocabulary."""
    from gguf import GGUFReader

    fields = GGUFReader(source).fields
    said = fields.get("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said.contents())
    kind = fields.get("tokenizer.ggml.model")
    return kind is not None and kind.contents() == "llama"


def _answer(model: Any) -> torch.Tensor:
    ids = torch.tensor(PROBE) % model.config.vocab_size
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found
