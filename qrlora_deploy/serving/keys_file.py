"""The file of keys: who may ask for whom, until when, and how many rows a second.

A key is `qd_ID_SECRET`. Its id is no secret: logs name keys by it. The secret has 256 random bits, so a salted SHA-256
is hash enough; a slow one, made for passwords, would let anybody without a key keep the server busy.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.formats.coefficients import CUSTOMER_ID
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.io.reading import is_file, parse_json, read_text
from qrlora_deploy.io.strict import Record, from_value
from qrlora_deploy.io.temporary import HAS_LOCKS
from qrlora_deploy.io.versions import Versions

if HAS_LOCKS:
    import fcntl

FORMAT = "qrlora-keys"
VERSIONS = Versions(1)

ANYONE = "*"
"""Among a key's customers: all of them; among the quotas: everyone who has no own."""

PREFIX = "qd"
MAX_KEY_CHARACTERS = 200
MAX_FILE_BYTES = 2**28
SALT_BYTES, SECRET_BYTES, ID_BYTES = 16, 32, 6

Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Salt = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
Customer = Annotated[str, StringConstraints(max_length=128)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class StoredKey(Record):
    """A key as the file holds it.

    Attributes:
        id: by which logs and `revoke` name it.
        hash: SHA-256 of salt and key, hexadecimal.
        customers: it may ask for; `*` is everyone.
        groups: of the file, whose customers it may ask for.
        admin: it may use the admin API.
        expires: ISO 8601 with its zone, after which it is no key any more; None: never.
        note: for people.
    """

    id: KeyId
    hash: Hex
    customers: list[Customer] = Field(default_factory=list)
    groups: list[Name] = Field(default_factory=list)
    admin: bool = False
    expires: str | None = None
    note: Annotated[str, StringConstraints(max_length=1000)] = ""

    @field_validator("customers")
    @classmethod
    def _are_customers(cls, names: list[str]) -> list[str]:
        return _customers(names)

    @field_validator("expires")
    @classmethod
    def _is_a_time(cls, text: str | None) -> str | None:
        if text is not None:
            parse_time(text)
        return text

    @property
    def expires_s(self) -> float | None:
        """The end as seconds since 1970."""
        return None if self.expires is None else parse_time(self.expires).timestamp()


class Quota(Record):
    """How much a customer may ask for.

    Attributes:
        rows_per_second: in the long run.
        burst: rows that may come at once after a pause; None: those of one second.
    """

    rows_per_second: float = Field(gt=0, le=1e9)
    burst: float | None = Field(default=None, ge=1, le=1e9)


class KeysFile(Record):
    """What a file of keys holds.

    Attributes:
        format: what the file is.
        format_version: of the format.
        salt: of all hashes in it, hexadecimal.
        keys: in the order in which they were added.
        groups: customers by the name of their group.
        quotas: by customer; `*` is everyone without an own one.
    """

    format: str = FORMAT
    format_version: int = VERSIONS.current
    salt: Salt
    keys: list[StoredKey] = Field(default_factory=list)
    groups: dict[Name, list[Customer]] = Field(default_factory=dict)
    quotas: dict[Customer, Quota] = Field(default_factory=dict)

    @field_validator("groups", "quotas")
    @classmethod
    def _name_customers(cls, found: dict[str, object], info: ValidationInfo) -> dict[str, object]:
        for names in [list(found)] if info.field_name == "quotas" else found.values():
            _customers(names)  # type: ignore[arg-type]
        return found

    @model_validator(mode="after")
    def _fits_together(self) -> "KeysFile":
        if ANYONE in self.quotas and self.quotas[ANYONE].burst is not None:
            raise ValueError(f"the quota of {ANYONE} has no burst; only that of a customer may have one")
        ids = [key.id for key in self.keys]
        if len(set(ids)) < len(ids):
            raise ValueError("two keys have the same id")
        missing = {group for key in self.keys for group in key.groups} - self.groups.keys()
        if missing:
            raise ValueError(f"a key names the group {min(missing)!r}, which is not among the groups")
        return self


def _customers(names: list[str]) -> list[str]:
    for name in names:
        if name != ANYONE and not CUSTOMER_ID.fullmatch(name):
            raise ValueError(f"{name!r} is no customer id and not {ANYONE}")
    return names


def parse_time(text: str) -> datetime:
    """A time in ISO 8601; a day alone is its begin, and a time without a zone is in UTC.

    Raises:
        ValueError: it is none.
    """
    try:
        time = datetime.fromisoformat(text)
        time = time if time.tzinfo else time.replace(tzinfo=UTC)
        time.timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is no time; write it as 2027-12-31 or 2027-12-31T12:00:00+00:00") from error
    return time


def hash_of(salt: bytes, key: str) -> bytes:
    """SHA-256 of a salt and a key."""
    return hashlib.sha256(salt + key.encode("utf-8", "surrogatepass")).digest()


def id_of(key: str) -> str:
    """The id in a key; empty where it has not the form of one."""
    prefix, _, rest = key.partition("_")
    return rest.partition("_")[0] if prefix == PREFIX and len(key) <= MAX_KEY_CHARACTERS else ""


def read_keys(path: Path) -> KeysFile:
    """Read and validate a file of keys.

    Raises:
        FileFormatError: it is damaged, has a name twice, or is of another version.
        InputError: it is not there or cannot be read.
    """
    if not is_file(path):
        raise InputError(f"{path}: no such file; `qrlora-deploy keys add` makes one")
    wrong = f"{path} is not a file of keys"
    text = read_text(path, MAX_FILE_BYTES)
    # A right that is there twice would be read otherwise by each reader.
    record = parse_json(text, wrong, unique=True)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FileFormatError(f'{wrong}: its "format" is not "{FORMAT}"')
    return from_value(KeysFile, VERSIONS.upgraded(path, record, wrong), wrong)


def write_keys(keys: KeysFile, path: Path) -> None:
    """Write a file of keys in one step.

    Raises:
        InputError: the place is none for a file.
        QrloraError: the disk is full.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(keys.model_dump(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def changing_keys(path: Path) -> Iterator[None]:
    """Keep others who change a file of keys waiting, so that nobody's change is lost. Readers need not wait.

    Raises:
        InputError: its folder is not there.
    """
    try:
        descriptor = os.open(path.absolute().parent, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        if HAS_LOCKS:
            # The file itself is replaced, so a lock on it would be one on what is gone.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def empty_keys() -> KeysFile:
    """A file without a key, with a salt of its own."""
    return KeysFile(salt=secrets.token_hex(SALT_BYTES))


def with_key(
    keys: KeysFile,
    customers: list[str],
    groups: list[str],
    admin: bool = False,
    expires: str | None = None,
    note: str = "",
) -> tuple[KeysFile, StoredKey, str]:
    """A file with one key more.

    Args:
        keys: the file.
        customers: that the key may ask for; `*` is everyone.
        groups: of the file.
        admin: it may use the admin API.
        expires: ISO 8601; None: never.
        note: for people.

    Returns:
        The new file, the key as it is stored, and the key itself, which is kept nowhere.

    Raises:
        InputError: a customer, a group or the time is none.
    """
    key_id = secrets.token_hex(ID_BYTES)
    key = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    record = {
        "id": key_id,
        "hash": hash_of(bytes.fromhex(keys.salt), key).hex(),
        "customers": customers,
        "groups": groups,
        "admin": admin,
        "expires": expires,
        "note": note,
    }
    whole = keys.model_dump() | {"keys": [*keys.model_dump()["keys"], record]}
    try:
        changed = from_value(KeysFile, whole, "the key cannot be added")
    except FileFormatError as error:
        raise InputError(str(error)) from error
    return changed, changed.keys[-1], key


def without_key(keys: KeysFile, key_id: str, path: Path) -> KeysFile:
    """A file without the key of this id.

    Args:
        keys: the file.
        key_id: of the key.
        path: where the file lies, for the message.

    Raises:
        InputError: there is no such key.
    """
    left = [key for key in keys.keys if key.id != key_id]
    if len(left) == len(keys.keys):
        raise InputError(f"{path}: no key has the id {key_id!r:.80}; `qrlora-deploy keys list {path}` shows the ids")
    return keys.model_copy(update={"keys": left})
