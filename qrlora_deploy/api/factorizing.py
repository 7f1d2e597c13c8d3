"""From a base to its basis."""

from collections.abc import Sequence
from pathlib import Path

from qrlora_deploy.api.inputs import Progress, StrPath
from qrlora_deploy.api.sources import as_checkpoint
from qrlora_deploy.errors import InputError
from qrlora_deploy.factorization.from_checkpoint import factorize as factorize_layers
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.registry import rule_of


def factorize(
    base: StrPath | Checkpoint,
    *,
    targets: str | Sequence[str] = (),
    last_layers: int | None = None,
    tau: float | None = None,
    rank: int | None = None,
    budget: int | None = None,
    spread: str | None = None,
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
            directions with the largest shares of their weight's energy.
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
            than the budget.
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
    rule = rule or rule_of(tau, rank, budget, spread)
    checkpoint = as_checkpoint(base)
    checkpoint.check_base()
    patterns = [targets] if isinstance(targets, str) else list(targets)
    names = choose_targets(checkpoint.skeleton(), patterns, last_layers)
    return factorize_layers(checkpoint, names, rule, device, progress, None if scratch is None else Path(scratch))
