"""`config.json` of a base: what is used of it is right, or it is refused by file and field.

No code that a checkpoint brings along is ever run.
"""

from pathlib import Path
from typing import Any

import transformers
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qrlora_deploy.errors import FileFormatError, InputError, library_errors
from qrlora_deploy.formats.provenance import read_config
from qrlora_deploy.models.loading import quiet_transformers
from qrlora_deploy.tasks.base import Task

CONFIG = "config.json"

MAX_LABELS = 10**6
MAX_LAYERS = 2000
"""transformers makes a name for every label and a module for every layer that a config asks for."""

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation", "activation_function")

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""Fields that transformers 4 does not check."""

ENCODERS = ("Model", "ForMaskedLM", "ForPreTraining")
"""Ends of the names of models that were trained on text alone, and that `warmup` gives a head."""

SPEAKERS = ("LMHeadModel", "HeadsModel")
"""Ends of the names of models that write text."""


def load_config(folder: Path) -> Any:
    """The transformers config of a checkpoint.

    The answer of a model as a tuple and an attention that may not be installed are settled here: nothing
    in this project takes the one, and transformers chooses the other.

    Raises:
        InputError: it is missing, or names code or a kind of model that transformers does not have.
        FileFormatError: it cannot be used.
    """
    file = folder / CONFIG
    _check_settings(file, read_config(folder))
    with library_errors(f"{file} cannot be used"), quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, return_dict=True)
    if getattr(config, "_attn_implementation", None) != "eager":
        config._attn_implementation = None
    # It saves memory, and fails where the length of a text is no multiple of it.
    config.chunk_size_feed_forward = 0
    return config


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """What transformers does not name when it refuses it, takes for something else, or never ends with."""
    kind = settings.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise FileFormatError(f"{file}: model_type must be a text, not {kind!r}")
    if settings.get("auto_map") and kind not in CONFIG_MAPPING:
        raise InputError(
            f"{file}: auto_map names code of the checkpoint's own, which is never run, and transformers itself has "
            f"no model type {kind!r}"
        )
    if settings.get("transformers_weights"):
        raise InputError(f"{file}: transformers_weights names another file than those that are read; remove it")
    for key in ("id2label", "quantization_config"):
        if not isinstance(settings.get(key), (dict, type(None))):
            raise FileFormatError(f"{file}: {key} must be an object, not {settings[key]!r}")
    for key, value in settings.items():
        if key in ACTIVATIONS and isinstance(value, str) and value not in ACT2FN:
            raise FileFormatError(f"{file}: transformers has no {key} {value!r}")
        if key in SIZES and value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise FileFormatError(f"{file}: {key} must be a whole number, not {value!r}")
        if isinstance(value, int) and "layer" in key and value > MAX_LAYERS:
            raise FileFormatError(f"{file}: {key} is {value}; more than {MAX_LAYERS} are not supported")
    _check_outputs(file, settings)


def _check_outputs(file: Path, settings: dict[str, Any]) -> None:
    count = settings.get("num_labels", 2)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= MAX_LABELS:
        raise FileFormatError(f"{file}: num_labels must be a number from 1 to {MAX_LABELS}, not {count!r}")
    wrong = [name for name in settings.get("id2label") or () if not name.isdecimal()]
    if wrong:
        raise FileFormatError(f"{file}: id2label must have the numbers of the outputs as keys, not {wrong[0]!r}")


def model_class(folder: Path, config: Any) -> Any:
    """The class of the model that a config names.

    Raises:
        InputError: it names none, or one that transformers does not have or that is for other configs.
    """
    file = folder / CONFIG
    names = config.architectures
    if not names:
        raise InputError(f'{file} names no architectures; add "architectures": ["{_classifier_name(config)}"]')
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise FileFormatError(f"{file}: architectures must be a list of names, not {names!r}")
    found = getattr(transformers, names[0], None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise InputError(f"{file}: transformers has no architecture {names[0]!r}")
    own = found.config_class
    if own is not None and not isinstance(config, own) and config.model_type != own.model_type:
        raise InputError(f"{file}: the architecture {names[0]} is none of model_type {config.model_type!r}")
    return found


def is_encoder(architecture: str) -> bool:
    """Whether a model is headless, or has the head that it was trained on text with."""
    return architecture.endswith(ENCODERS) and not architecture.endswith(SPEAKERS)


def class_for(config: Any, model_class: str) -> Any | None:
    """transformers' class for a config, by the name of the automatic one; None where there is none.

    Audio and images have no text classifier.
    """
    found: Any = getattr(transformers, model_class)._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, (tuple, list)) else found


def _classifier_name(config: Any) -> str:
    found = class_for(config, Task.model_class)
    return "the class of the model" if found is None else str(found.__name__)
