"""The next token of each row of a run."""

from collections.abc import Mapping

import numpy as np

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.generation.sampling import Choice, Sampler
from qrlora_deploy.runtime.generation.stepping import Answers


def choose_all(samplers: Mapping[int, Sampler], answers: Answers) -> dict[int, Choice | QrloraError]:
    """What each row chooses, or why its logits cannot be used.

    Args:
        samplers: by row.
        answers: of the run.
    """
    found: dict[int, Choice | QrloraError] = {}
    others = {}
    for row, sampler in samplers.items():
        token = answers.likeliest(row) if sampler.takes_likeliest else None
        if token is None:
            others[row] = sampler
        else:
            found[row] = sampler.take(token)
    if others:
        logits = answers.logits(list(others))
        found.update({row: _choose(others[row], theirs) for row, theirs in zip(others, logits, strict=True)})
    return found


def _choose(sampler: Sampler, logits: np.ndarray) -> Choice | QrloraError:
    try:
        return sampler.choose(logits)
    except QrloraError as error:
        return error
