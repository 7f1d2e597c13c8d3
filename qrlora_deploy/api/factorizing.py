"""From a base to its basis."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qrlora_deploy.api.inputs import Progress, StrPath
from qrlora_deploy.api.sources import as_checkpoint, as_examples
from qrlora_deploy.data.examples import Examples, read_texts
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.factorization.from_checkpoint import factorize as factorize_layers
from qrlora_deploy.factorization.selection import keep_directions
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.budgets import check_budget, check_enough, largest
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.registry import rule_of
from qrlora_deploy.rank_rules.sensitivity_budget import SensitivityBudget
from qrlora_deploy.training.observing import Observation, check_labels, second_moments, sensitivities

SENSITIVITY = "sensitivity"
"""The `spread` that looks at data."""


def factorize(
    base: StrPath | Checkpoint,
    *,
    targets: str | Sequence[str] = (),
    last_layers: int | None = None,
    tau: float | None = None,
    rank: int | None = None,
    budget: int | None = None,
    spread: str | None = None,
    whiten: bool = False,
    data: StrPath | Examples | Sequence[StrPath | Examples] = (),
    batches: int = 24,
    max_length: int = 128,
    seed: int = 0,
    text_column: str | None = None,
    label_column: str | None = None,
    rule: RankRule | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    scratch: StrPath | None = None,
) -> Basis:
    """Factorize the weights of a base into the basis that all its customers share.

    Each weight `W [out, in]` becomes `Q [out, rank] R [rank, in]` by QR with column pivoting (Golub and Van Loan,
    Matrix Computations, section 5.4), which Liang and Bharadwaj (arXiv 2508.21810) take for LoRA.

    Args:
        base: folder or hub name of a text classifier, or of an encoder that can become one.
        targets: names of layers, such as `["query", "value"]`, or regular expressions over the whole module path;
            none means every linear layer of every block.
        last_layers: only the last N blocks.
        tau: share of the energy of R's diagonal to keep, above 0 and at most 1; 0.5 where there is neither rank nor
            budget.
        rank: a fixed number of directions of each weight instead.
        budget: a number of directions of all weights together instead, which `spread` spreads over them. A weight that
            gets none is left out of the basis.
        spread: "even" (the default): the same rank in every weight as far as its size allows; "energy": the
            directions with the largest shares of their weight's energy; "sensitivity": those in which the loss of
            `data` has the largest mean square gradient, not always a weight's leading ones.
        whiten: weight the columns of each weight by what goes into its layer on `data`: pivoted QR is of
            `W E[x x^T]^(1/2)`, and R is `Q^T W`, so that updates are `Q diag(c) R` as ever.
        data: for `spread="sensitivity"` and `whiten`: a file of one customer, or several, or `Examples`. For
            "sensitivity" with labels that the base's head knows, which `warmup` can give it. The basis remembers the
            digests.
        batches: of 32 rows that are looked at, from each file in turn.
        max_length: tokens of a row that are read.
        seed: of the rows that are drawn.
        text_column: column of the text, or two with a comma between them; common names are found.
        label_column: column of the label; "label" is found.
        rule: another rule instead, which may see all weights at once; see `qrlora_deploy.rank_rules.base`.
        device: "cpu" (LAPACK in fp64) or "cuda".
        progress: called with (description, done, total) after each weight.
        scratch: a folder where the factors lie instead of in memory, for a basis that may be larger; remove it when
            the basis is saved.

    Returns:
        The basis; `save` writes it.

    Raises:
        InputError: there is no such base or layer, the base is none of the supported kind or is not whole, or more
            than one of tau, rank, budget and rule is given, or it is out of range, or the weights have fewer directions
            than the budget, or data are needed, not needed, or do not fit the base.
        ProviderError: CUDA was asked for where there is none.

    Examples:
        >>> basis = qr.factorize("base", targets=["query", "value"], tau=0.5)
        >>> basis.save("basis.safetensors")
        >>> basis.total_rank == sum(basis.ranks.values())
        True
        >>> qr.factorize("base", budget=8, spread="even").total_rank
        8
    """
    if rule is not None and any(value is not None for value in (tau, rank, budget, spread)):
        raise InputError("rule, tau, rank and budget exclude each other; give one of them")
    by_loss = spread == SENSITIVITY
    look = Observation(batches=batches, max_length=max_length, seed=seed)
    sources = [data] if isinstance(data, str | os.PathLike | Examples) else list(data)
    _check_wanted(bool(sources), by_loss, whiten, budget)
    # Every direction that there is, to choose from.
    wanted = EnergyShare(1.0) if by_loss else rule or rule_of(tau, rank, budget, spread)
    checkpoint = as_checkpoint(base)
    checkpoint.check_base()
    patterns = [targets] if isinstance(targets, str) else list(targets)
    names = choose_targets(checkpoint.skeleton(), patterns, last_layers)
    parts = [_read(source, checkpoint, by_loss, text_column, label_column) for source in sources]
    seen = look.seen(parts) if parts else None
    if by_loss:
        check_labels(checkpoint, parts)
    moments = second_moments(checkpoint, names, parts, look, device, progress) if whiten else None
    place = None if scratch is None else Path(scratch)
    basis = factorize_layers(checkpoint, names, wanted, device, progress, place, moments)
    if seen is None:
        return basis
    if whiten:
        basis = replace(basis, weighting=seen)
    if budget is None or not by_loss:
        return basis
    scores = sensitivities(checkpoint, basis, parts, look, device, progress)
    check_enough(budget, basis.total_rank)
    return keep_directions(basis, largest(scores, budget), SensitivityBudget(budget, seen))


def _read(
    source: StrPath | Examples, checkpoint: Checkpoint, by_loss: bool, text_column: str | None, label_column: str | None
) -> Examples:
    """One customer's rows; labels are not asked for where nothing looks at them."""
    if isinstance(source, Examples) or checkpoint.writes_text:
        return as_examples(source, text_column, label_column, written=checkpoint.writes_text)
    if by_loss:
        return as_examples(source, text_column, label_column, labelled=checkpoint.has_task_head)
    found = read_texts(os.fspath(source), text_column)
    return Examples(found.texts, found.pairs, [""] * len(found.texts), found.name)


def _check_wanted(given: bool, by_loss: bool, whiten: bool, budget: int | None) -> None:
    """Refuse, by an InputError, data that nothing looks at, and a choice that lacks what it needs."""
    asked = [argument("spread", SENSITIVITY)] if by_loss else [argument("whiten", True)] if whiten else []
    if asked and not given:
        raise InputError(f"{asked[0]} needs {argument('data')}: text of the customers that the basis is for")
    if given and not asked:
        raise InputError(
            f"{argument('data')} does nothing unless there is {argument('spread', SENSITIVITY)} or "
            f"{argument('whiten', True)}"
        )
    if by_loss and budget is None:
        raise InputError(f"{argument('spread', SENSITIVITY)} needs {argument('budget')}, the number of directions")
    if budget is not None:
        check_budget(budget)
