"""The task that docs/extending.md shows."""

import re

import numpy as np
import torch

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.tasks.base import Task
from tests.test_docs import ROOT
from tests.tolerances import FP32_SIDE_BRANCH


def shown() -> Task:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    [body] = re.findall(r"^```python\n(from collections.abc import Sequence\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(body, names)
    task = names["Poisson"]
    assert isinstance(task, type) and issubclass(task, Task)
    return task()


def test_the_task_of_the_page_computes_what_it_says() -> None:
    task, random = shown(), torch.Generator().manual_seed(0)
    logits = torch.randn(9, 1, generator=random)
    targets = torch.randint(0, 5, (9,), generator=random)
    expected = torch.nn.functional.poisson_nll_loss(logits[:, 0], targets.float(), log_input=True, full=False)
    torch.testing.assert_close(task.loss(logits, targets), expected, **FP32_SIDE_BRANCH)
    found = task.answer(logits[0].numpy(), ("rate",)).score
    np.testing.assert_allclose(found, np.exp(logits[0, 0]), **FP32_SIDE_BRANCH)
    rows = Examples(["a", "b"], None, ["1", "3"], "rows")
    assert task.encode(rows, ("rate",)) == [1.0, 3.0]
    np.testing.assert_allclose(task.new_head(rows).bias, np.log(2), **FP32_SIDE_BRANCH)
