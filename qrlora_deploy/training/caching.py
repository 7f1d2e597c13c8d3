"""Whether a run keeps what its frozen trunk answers, where, and why not."""

from typing import Any

from transformers import DataCollatorWithPadding

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.models.adapter import QRLoRALinear
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.training.batches import collator_for
from qrlora_deploy.training.cached_decoder import CachedDecoder, cache_decoder
from qrlora_deploy.training.cached_trainer import CachedModel, Texts, build_cached
from qrlora_deploy.training.rows import Rows, texts_of
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trunk.memory import CacheWish

Cached = CachedModel | CachedDecoder


def cache_trunk(
    model: Any, task: Task, tokenizer: Any, rows: Rows, settings: TrainSettings, wish: CacheWish
) -> tuple[Cached | None, str]:
    """The part above the trunk, or None where the whole model is to be trained; and where the cache
    is, or why there is none.

    Args:
        model: on its device, with its side branches.
        task: of the rows.
        tokenizer: of the base.
        rows: every row, those that are held out last.
        settings: of the run.
        wish: where the cache shall be, or "off".

    Raises:
        InputError: a place was asked for by name, and the model or the room does not allow it.
    """
    if settings.dropout or wish.wanted == "off":
        return None, "off"
    try:
        cached = _cached(model, task, tokenizer, rows, settings, wish)
        return cached, cached.cache.place
    except InputError as error:
        if wish.wanted == "auto":
            return None, f"off: {error}"
        raise InputError(f"{argument('trunk_cache', wish.wanted)}: {error}") from error


def _cached(model: Any, task: Task, tokenizer: Any, rows: Rows, settings: TrainSettings, wish: CacheWish) -> Cached:
    targets = [path for path, module in model.named_modules() if isinstance(module, QRLoRALinear)]
    if task.writes_text:
        return cache_decoder(model, targets, rows, collator_for(task, tokenizer), wish)
    if settings.base_dtype != "fp32":
        raise InputError("not with a base in bf16")
    texts = [text for row in rows for text in texts_of(row)]
    known = Texts(texts, DataCollatorWithPadding(tokenizer), tokenizer.padding_side)
    return build_cached(model, targets, known, task, wish)
