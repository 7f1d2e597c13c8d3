"""Updates from elsewhere as customers: a LoRA, a tuned checkpoint, and customers of another basis."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qrlora_deploy.api.inputs import Progress, StrPath, as_basis
from qrlora_deploy.api.sources import as_checkpoint
from qrlora_deploy.errors import InputError, QrloraError, argument
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import SUFFIX, Coefficients, write_coefficients
from qrlora_deploy.formats.customer_files import customer_ids, customer_of, read_customer, read_customer_file
from qrlora_deploy.io.outputs import make_folder
from qrlora_deploy.io.reading import is_file
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.locating import locate_basis
from qrlora_deploy.projection.projecting import Projection
from qrlora_deploy.projection.projecting import project as project_onto
from qrlora_deploy.projection.rebasing import REBASED, Rebasing


@dataclass(frozen=True)
class Rebased:
    """What became of one customer.

    Attributes:
        customer: its id.
        share: of its update's squared norm that the new coefficients hold; None where there are none.
        refused: why it was not written; empty where it was, or was there from an earlier run.
    """

    customer: str
    share: float | None
    refused: str = ""


def project(
    source: StrPath, base: StrPath | Checkpoint, basis: StrPath | Basis, *, labels: Sequence[str] = ()
) -> Projection:
    """Turn an update that was made elsewhere into a customer, by least squares: the closest `Q diag(c) R` to `ΔW`.

    Args:
        source: a LoRA folder that PEFT wrote, or the folder of a checkpoint that was tuned from the base.
        base: folder or hub name of the base of both.
        basis: made from this base: a file or a `Basis`.
        labels: names of the outputs of a LoRA's own head, which its folder does not say; empty: the base's.

    Returns:
        The customer, in memory, with the share of the update that it holds; `train(start=...)` goes on from there.

    Raises:
        InputError: the source is no change of this base, or changes what no customer can have.
        BasisMismatchError: the basis was made from other weights.
        FileFormatError: the LoRA is damaged.

    Examples:
        >>> qr.merge("base", "basis.safetensors", "customers/acme.safetensors", "tuned")  # doctest: +ELLIPSIS
        MergeReport(...)
        >>> made = qr.project("tuned", "base", "basis.safetensors")
        >>> round(made.share, 3)
        1.0
        >>> made.customer.save("customers/again.safetensors")
    """
    if isinstance(labels, str):
        raise InputError(f"{argument('labels')} must be a list of names; put one name into a list")
    return project_onto(Path(source), as_checkpoint(base), as_basis(basis), labels)


def rebase(
    customers: StrPath,
    to: StrPath | Basis,
    output: StrPath,
    *,
    basis: StrPath | Basis | None = None,
    base: StrPath | Checkpoint | None = None,
    least_share: float = 0.0,
    progress: Progress | None = None,
) -> list[Rebased]:
    """Move customers to another basis, by least squares; a run that was interrupted goes on where it stopped.

    Args:
        customers: a folder of coefficients files, or one file.
        to: the basis that they go to: a file or a `Basis`.
        output: folder that the new files go to, under the same names; it is made if it is missing.
        basis: that they were trained on; None: each file remembers where it is.
        base: of `to`, where it is another one than that of the customers; their updates stay what they are.
        least_share: of an update that must be held; a customer with less is not written.
        progress: called with (description, done, total) after each.

    Returns:
        What became of each customer, in order of their ids.

    Raises:
        InputError: there are no customers, the bases do not fit each other, or `output` is the customers' own folder,
            or a file.
        BasisMismatchError: the new basis was made from other weights than its base.

    Examples:
        >>> wider = qr.factorize("base", tau=0.9)
        >>> [done] = qr.rebase("customers/acme.safetensors", wider, "moved")
        >>> done.customer, round(done.share, 3), done.refused
        ('acme', 1.0, '')
    """
    if not 0 <= least_share <= 1:
        raise InputError(f"{argument('least_share', least_share)} must be between 0 and 1")
    place, new = Path(output), as_basis(to)
    folder, names = _customers(Path(customers))
    if place.resolve() == folder.resolve():
        raise InputError(f"{place} holds the customers themselves; give another folder for the new files")
    movers = _Movers(new, None if basis is None else as_basis(basis), None if base is None else as_checkpoint(base))
    _make_folder(place)
    done = []
    for number, name in enumerate(names, start=1):
        done.append(_rebase_one(folder, name, movers, place, least_share))
        if progress is not None:
            progress("customers", number, len(names))
    return done


def _customers(source: Path) -> tuple[Path, list[str]]:
    if is_file(source):
        name = customer_of(source.name)
        if name is None:
            raise InputError(f"{source} is no customer's file; give one like acme{SUFFIX}, or a folder of them")
        return source.parent, [name]
    names = sorted(customer_ids(source))
    if not names:
        raise InputError(f"{source} holds no customers: files like acme{SUFFIX}")
    return source, names


def _make_folder(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise InputError(f"{place} is a file; give the name of a folder to {argument('output')}")
    make_folder(place)


def _rebase_one(folder: Path, name: str, movers: "_Movers", place: Path, least_share: float) -> Rebased:
    target = place / f"{name}{SUFFIX}"
    try:
        customer = read_customer(folder, name)
        known = _share_of_earlier(target, customer, movers)
        if known is not None:
            return Rebased(name, known, _too_little(known, least_share, f"; {target} is there from an earlier run"))
        made = movers.of(customer, folder / target.name).customer(customer)
    except QrloraError as error:
        # One file that cannot be moved must not cost the others.
        return Rebased(name, None, str(error))
    refused = _too_little(made.share, least_share)
    if not refused:
        write_coefficients(made.customer, target)
    return Rebased(name, made.share, refused)


def _too_little(share: float, least_share: float, more: str = "") -> str:
    """Why a customer is refused for its share; empty where it is not."""
    return (
        f"the new basis holds {share:.3f} of its update, less than {least_share}{more}" if share < least_share else ""
    )


def _share_of_earlier(target: Path, customer: Coefficients, movers: "_Movers") -> float | None:
    """The share of a file that an earlier run made of the same customer for the same base; None where there is none."""
    if not is_file(target):
        return None
    found = read_customer_file(target)
    record = found.training.get(REBASED)
    base_digest = customer.base_digest if movers.base is None else movers.base.digest
    made_of = (record.get("digest") if isinstance(record, dict) else None, found.basis_digest, found.base_digest)
    if not isinstance(record, dict) or made_of != (customer.digest, movers.new.digest, base_digest):
        return None
    return float(record["share"])


class _Movers:
    """A `Rebasing` for each basis that customers come from; what does not fit whoever comes is refused at once."""

    def __init__(self, new: Basis, old: Basis | None, base: Checkpoint | None) -> None:
        self.new, self.base = new, base
        self._old = old
        self._known: dict[str, Rebasing] = {}
        if old is not None:
            self._known[old.digest] = Rebasing(old, new, base)
        elif base is not None:
            check_basis_fits(base, new)

    def of(self, customer: Coefficients, file: Path) -> Rebasing:
        """That of a customer, which was read from `file`."""
        if customer.basis_digest not in self._known:
            old = self._old if self._old is not None else locate_basis(customer, file)
            customer.check_fits(old)
            self._known[customer.basis_digest] = Rebasing(old, self.new, self.base)
        return self._known[customer.basis_digest]
