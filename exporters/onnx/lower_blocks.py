"""The blocks of a model below its adapted layers, which answer all customers alike: computed once for an input.

Nothing is assumed of the model but that it computes in one order. Blocks that end before the first adapted layer begins
cannot depend on coefficients, so in further runs on the same inputs they give what they gave, to the bit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


class LowerBlocks:
    """What the lower blocks answered to the inputs of the last run."""

    def __init__(self) -> None:
        self._inputs: object = None
        self._answers: list[Any] = []
        self._known: Iterator[Any] = iter(())
        self._below = False

    @contextmanager
    def within(self, model: nn.Module, adapted: Iterable[nn.Module]) -> Iterator[None]:
        """Let the blocks of `model` below its `adapted` layers compute once for each input.

        Each run is announced by `begin`. Between runs on the same inputs nothing changes but coefficients and layers
        that come after the blocks.
        """
        hooks = [layer.register_forward_pre_hook(self._reach) for layer in adapted]
        blocks = list(_outermost_blocks(model))
        for block in blocks:
            block.forward = partial(self._answer, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward
            for hook in hooks:
                hook.remove()

    def begin(self, inputs: object) -> None:
        """Say what the run that begins is on; the very object of the run before means the same inputs."""
        self._below = inputs is not self._inputs
        if self._below:
            self._inputs, self._answers = inputs, []
        self._known = iter(self._answers if not self._below else ())

    def _reach(self, *_: Any) -> None:
        """An adapted layer begins: what ends from here on depends on coefficients."""
        self._below = False

    def _answer(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The answer of a block, whose own forward is `compute`."""
        for known in self._known:
            return known
        found = compute(*args, **kwargs)
        if self._below:
            self._answers.append(found)
        return found


def _outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of lists of modules that are not inside of such a member."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _outermost_blocks(child)
