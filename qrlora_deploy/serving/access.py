"""Who asks, and for whom that one may ask: keys of a file that is followed while the server runs."""

import hmac
import logging
import math
import os
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.customers.polling import Signature, signature_of, status_of
from qrlora_deploy.runtime.host.collection import no_collection
from qrlora_deploy.serving.kept_keys import keep_copy
from qrlora_deploy.serving.keys_file import ANYONE, KeysFile, Quota, StoredKey, hash_of, id_of, read_keys
from qrlora_deploy.serving.refusals import ForbiddenError, UnauthenticatedError

_log = logging.getLogger("qrlora_deploy.serving.access")

LOOK_S = 1.0
"""Between two looks at the file."""


@dataclass(frozen=True)
class Access:
    """What a request may ask for.

    Attributes:
        key_id: of the key that came with it, for logs; empty where none was asked for.
        customers: sets of customers that it may ask for; None: everyone.
        admin: it may use the admin API.
    """

    key_id: str = ""
    customers: tuple[frozenset[str], ...] | None = None
    admin: bool = False

    def allows(self, customer: str | None) -> bool:
        """Whether it may ask for a customer, which need not exist. The base, None, is everyone's.

        Ask this before anything is looked up, and answer no as if there were no such customer.
        """
        if customer is None or self.customers is None:
            return True
        return any(customer in names for names in self.customers)

    def check_admin(self) -> None:
        """Make sure that it may use the admin API.

        Raises:
            ForbiddenError: it may not.
        """
        if not self.admin:
            raise ForbiddenError(
                "this key has not the admin right; `qrlora-deploy keys add --admin` makes one that has"
            )


open_access = Access()
"""Where no keys are asked for: every customer, and no admin API."""


def key_of(authorization: str | None) -> str | None:
    """The key in a header `Authorization: Bearer KEY`; None where there is none."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


ADMIN, EVERYONE = 1, 2
"""Bits of a key's rights."""

DIGEST_BYTES = 32


@dataclass(frozen=True)
class _State:
    """A file of keys, ready to be asked. There may be a hundred thousand, so that nothing is an object of its own which
    Python's collector would walk over again and again: key `n` is `digests[32 * n:]`, `expires_s[n]` and so on.

    Attributes:
        rows: numbers of the keys by their ids; the one behind the last is nobody's.
        expires_s: seconds since 1970; infinite: never.
        rights: bits.
        customers: names, without those of the groups.
    """

    salt: bytes
    rows: Mapping[str, int]
    digests: bytes
    expires_s: "array[float]"
    rights: bytes
    customers: Sequence[tuple[str, ...]]
    key_groups: Sequence[tuple[str, ...]]
    groups: Mapping[str, frozenset[str]]
    quotas: Mapping[str, Quota]

    @classmethod
    def of(cls, file: KeysFile) -> "_State":
        groups = {name: frozenset(names) for name, names in file.groups.items()}
        return cls(
            bytes.fromhex(file.salt),
            {key.id: row for row, key in enumerate(file.keys)},
            b"".join(bytes.fromhex(key.hash) for key in file.keys) + bytes(DIGEST_BYTES),
            array("d", [math.inf if key.expires_s is None else key.expires_s for key in file.keys] + [-math.inf]),
            bytes([*(_rights_of(key, groups) for key in file.keys), 0]),
            [tuple(key.customers) for key in file.keys],
            [tuple(key.groups) for key in file.keys],
            groups,
            dict(file.quotas),
        )

    def verified(self, key: str) -> tuple[int, str] | None:
        """Number and id of a key that is known and has not expired."""
        key_id = id_of(key)
        # Who is unknown is compared, too: it takes as long.
        row = self.rows.get(key_id, len(self.rows))
        right = hmac.compare_digest(
            hash_of(self.salt, key), self.digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
        )
        return (row, key_id) if right and time.time() < self.expires_s[row] else None

    def access(self, row: int, key_id: str) -> Access:
        rights = self.rights[row]
        if rights & EVERYONE:
            return Access(key_id, None, bool(rights & ADMIN))
        # Keys share the sets of their groups, which may be large.
        names = (frozenset(self.customers[row]), *(self.groups[name] for name in self.key_groups[row]))
        return Access(key_id, names, bool(rights & ADMIN))


def _rights_of(key: StoredKey, groups: Mapping[str, frozenset[str]]) -> int:
    everyone = ANYONE in key.customers or any(ANYONE in groups[name] for name in key.groups)
    return (ADMIN if key.admin else 0) | (EVERYONE if everyone else 0)


def _read(path: Path) -> _State:
    """Read a file of keys, without Python's collector: it walks over all that is made, and every request would wait."""
    with no_collection():
        return _State.of(read_keys(path))


class QuotaNumbers(NamedTuple):
    """Quotas of customers, as a file of keys has them.

    Attributes:
        rows_s: rows a second by customer.
        default: of every other customer; None: as many as it likes.
        bursts: rows that may come at once, by customer; of others those of one second.
    """

    rows_s: Mapping[str, float]
    default: float | None
    bursts: Mapping[str, float]


class Keys:
    """A file of keys. Safe for many threads.

    About once a second, when somebody asks, a thread looks whether the file is another one. A new file that cannot be
    read is told in one line of the log, and the old keys go on.

    Args:
        path: the file.
        changed: called after a new file was taken.
        kept: place of a copy of the file that was read last.
        keeps: write that copy; otherwise it is read alone, where the file itself cannot be.

    Attributes:
        refused: why the file as it is now is not used; None: it is.

    Verifying a key is one SHA-256 and one comparison in constant time, some microseconds; neither keys nor what was
    verified is kept.
    """

    def __init__(
        self,
        path: Path,
        changed: Callable[["Keys"], None] | None = None,
        kept: Path | None = None,
        keeps: bool = False,
    ) -> None:
        self.path = path
        self._changed, self._kept, self._keeps = changed, kept, keeps
        self._lock = threading.Lock()
        self.refused: QrloraError | None = None
        self._seen = signature_of(status_of(path))
        self._state = self._first()
        self._looked = time.monotonic()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        changed: Callable[["Keys"], None] | None = None,
        kept: Path | None = None,
        keeps: bool = False,
    ) -> "Keys":
        """Read a file of keys.

        Args:
            path: the file.
            changed: called after a new file was taken, from any thread.
            kept: place of a copy of the file that was read last.
            keeps: write that copy; otherwise it is read alone, where the file itself cannot be.

        Raises:
            FileFormatError: it is damaged, and there is no copy.
            InputError: it is not there or cannot be read, and there is no copy.
        """
        return cls(Path(path), changed, kept, keeps)

    def _first(self) -> _State:
        """The keys at the start: those that were read before where there are some and the file cannot be used now."""
        try:
            state = _read(self.path)
        except QrloraError as error:
            if self._kept is None or not self._kept.exists():
                raise
            self.refused = error
            _log.warning("%s; the keys that were read before go on", error)
            return _read(self._kept)
        self._keep()
        return state

    def _keep(self) -> None:
        if self._kept is not None and self._keeps:
            keep_copy(self.path, self._kept, self._seen)

    def access(self, key: str | None) -> Access:
        """What a key may ask for.

        Raises:
            UnauthenticatedError: there is no key, or it is not known, or has expired.
        """
        if time.monotonic() - self._looked >= LOOK_S:
            self._look()
        if not key:
            raise UnauthenticatedError("a key is needed; send it as the header Authorization: Bearer KEY")
        state = self._state
        found = state.verified(key)
        if found is None:
            raise UnauthenticatedError("the key is not known or has expired")
        return state.access(*found)

    def quotas(self) -> QuotaNumbers:
        """What `Quotas` and `Quotas.change` take: `quotas.change(*keys.quotas())`."""
        own = {name: quota for name, quota in self._state.quotas.items() if name != ANYONE}
        everyone = self._state.quotas.get(ANYONE)
        return QuotaNumbers(
            {name: quota.rows_per_second for name, quota in own.items()},
            None if everyone is None else everyone.rows_per_second,
            {name: quota.burst for name, quota in own.items() if quota.burst is not None},
        )

    def reload(self) -> bool:
        """Read the file again, if it is another one than was read last; whether a new one was taken."""
        with self._lock:
            self._looked = time.monotonic()
            signature = signature_of(status_of(self.path))
            if signature == self._seen:
                return False
            taken = self._take(signature)
        if taken and self._changed is not None:
            self._changed(self)
        return taken

    def _take(self, signature: Signature | None) -> bool:
        # Also where it is refused: the same file is refused once.
        self._seen = signature
        try:
            self._state = _read(self.path)
        except QrloraError as error:
            self.refused = error
            _log.warning("%s; the keys that were read before go on", error)
            return False
        self.refused = None
        self._keep()
        _log.info("%s was read again: %d keys", self.path, len(self._state.rows))
        return True

    def _look(self) -> None:
        self._looked = time.monotonic()
        # Not in the thread that asks: a large file, or a slow disk, would hold up every request.
        threading.Thread(target=self._reload_quietly, name="keys-reader", daemon=True).start()

    def _reload_quietly(self) -> None:
        try:
            self.reload()
        except Exception:
            _log.exception("%s could not be looked at; the keys that were read before go on", self.path)
