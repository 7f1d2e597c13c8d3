"""Keys and values of beginnings of prompts, kept for the next prompt of the same customer that begins alike."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np

from qrlora_deploy.runtime.generation.budget import Budget


class Block(Protocol):
    """Keys and values of some tokens, wherever they lie."""

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""


class PrefixCache:
    """Blocks of a fixed number of tokens; those not used for longest give way.

    A prompt is read in the same blocks whether its beginning is known or not, so what is kept here changes no bit of
    an answer.

    Args:
        budget: of all caches; a block is kept only where there is room.
        most: bytes at most.
        block_tokens: tokens of a block.

    Attributes:
        used: bytes that are kept.
        hits: blocks that were found.
    """

    def __init__(self, budget: Budget, most: int, block_tokens: int) -> None:
        self._budget, self._most, self._tokens = budget, most, block_tokens
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self.used = self.hits = 0

    def find(self, owner: bytes, prompt: Sequence[int]) -> list[Block]:
        """The blocks that a prompt begins with, of those that are known.

        At least one token of the prompt is left over: the model reads it for its logits.

        Args:
            owner: digest of the coefficients by which the prompt is read.
            prompt: ids.
        """
        keys: list[bytes] = []
        for key in self._keys(owner, prompt, (len(prompt) - 1) // self._tokens):
            if key not in self._blocks:
                break
            keys.append(key)
        for key in reversed(keys):
            # The first one last: without it the others would not be found.
            self._blocks.move_to_end(key)
        self.hits += len(keys)
        return [self._blocks[key] for key in keys]

    def keep(
        self, owner: bytes, prompt: Sequence[int], number: int, size_bytes: int, read: Callable[[], Block]
    ) -> None:
        """Keep the block `number`, from 0 on, of a prompt, where there is room.

        Args:
            size_bytes: of the block.
            read: gives it; called only where it is kept.
        """
        key = list(self._keys(owner, prompt, number + 1))[-1]
        if key in self._blocks or size_bytes > self._most:
            return
        self.free(self.used + size_bytes - self._most)
        if not self._budget.fits(size_bytes):
            return
        # Where memory ends before the budget does, there is one block less.
        with suppress(MemoryError):
            self._blocks[key] = read()
            self._budget.take(size_bytes)
            self.used += size_bytes

    def free(self, size_bytes: int) -> None:
        """Let go of blocks until so many bytes are free, or none is left."""
        while size_bytes > 0 and self._blocks:
            _, block = self._blocks.popitem(last=False)
            self._budget.take(-block.nbytes)
            self.used -= block.nbytes
            size_bytes -= block.nbytes

    def _keys(self, owner: bytes, prompt: Sequence[int], blocks: int) -> Iterator[bytes]:
        key = owner
        for start in range(0, blocks * self._tokens, self._tokens):
            tokens = np.array(prompt[start : start + self._tokens], dtype=np.int64)
            key = hashlib.sha256(key + tokens.tobytes()).digest()
            yield key
