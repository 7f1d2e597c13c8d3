"""The customers' objects under one prefix: listed page by page, and read whole within a bound."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

from qrlora_deploy.errors import InputError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import SUFFIX, Coefficients
from qrlora_deploy.formats.customer_files import (
    MAX_SENT_BYTES,
    check_customer_id,
    customer_of,
    read_customer_content,
)
from qrlora_deploy.runtime.customers.objects.patience import Patience, StoreDownError
from qrlora_deploy.runtime.customers.objects.places import open_place

T = TypeVar("T")

TIMEOUT_S = 10.0
"""Of one question to a store."""

TAGS = ("ETag", "etag", "generation")
TIMES = ("mtime", "LastModified", "last_modified", "modified", "created", "ino")
"""What tells versions of an object apart: a tag, or where there is none all of these."""

Found = tuple[str, bytes]
"""A customer, and the mark of its object."""


class Bucket:
    """Objects `<customer>.safetensors` under a URL. Safe for many threads.

    The key of an object is made of the prefix and a customer's id, which holds no slash and no dot in front: nothing
    outside of the prefix can be asked for.

    Args:
        url: of the prefix, as `check_url` allows.

    Attributes:
        url: as given, without a slash at the end.
        patience: says whether the store answers.

    Raises:
        InputError: as `open_place`.
    """

    def __init__(self, url: str) -> None:
        self._files, self._root = open_place(url)
        self.url = url.rstrip("/")
        self.patience = Patience(self.url)

    def pages(self) -> Iterator[list[Found]]:
        """All customers and the marks of their objects, a page at a time.

        S3 gives pages of a thousand; of the other stores fsspec gives the whole list at once.

        Raises:
            InputError: there is no such place.
            StoreDownError: the store does not answer.
        """
        if hasattr(self._files, "call_s3"):
            yield from self._s3_pages()
            return
        listed = self._asked(lambda: self._do(self._files.ls, self._root, detail=True))
        yield list(_customers(listed, lambda entry: entry["name"]))

    def read(self, customer: str) -> tuple[bytes, bytes]:
        """The content of a customer's object, and its mark.

        Raises:
            UnknownCustomerError: there is no such object, but others.
            InputError: the id is none, or the object is too large.
            StoreDownError: the store does not answer, or the whole place is not there or empty.
        """
        check_customer_id(customer)
        key = f"{self._root}/{customer}{SUFFIX}"
        try:
            return self.patience.attempt(lambda: self._read(key), what=customer)
        except FileNotFoundError:
            self._check_place()
            raise UnknownCustomerError(f"{self.url} holds no customer {customer!r}") from None

    def coefficients(self, customer: str) -> Coefficients:
        """What a customer's object holds, validated.

        Raises:
            FileFormatError: it is damaged or not complete.
            QrloraError: as `read`.
        """
        return read_customer_content(self.read(customer)[0], f"{self.url}/{customer}{SUFFIX}")

    def _check_place(self) -> None:
        """Make sure that the place has customers: a store says of a missing bucket what it says of a missing object.

        Raises:
            StoreDownError: it has none, is not there, or does not answer.
        """
        try:
            if any(self.pages()):
                return
        except InputError as error:
            raise StoreDownError(str(error)) from error
        raise StoreDownError(str(self.emptied()))

    def emptied(self) -> InputError:
        """What is wrong with a place that had customers and has none: more likely somebody has moved it."""
        self.patience.missing()
        return InputError(f"{self.url} is empty")

    def _read(self, key: str) -> tuple[bytes, bytes]:
        facts = self._do(self._files.info, key)
        size = int(facts["size"] or 0)
        if facts["type"] != "file":
            raise FileNotFoundError(key)
        if size > MAX_SENT_BYTES:
            raise InputError(f"{key} has {size} bytes; a customer has {MAX_SENT_BYTES} at most")
        # Not more than it should have, whatever it became. An empty range would be all of it (findings/s3fs_*.sh).
        content = self._do(self._files.cat_file, key, start=0, end=size + 1) if size else b""
        if len(content) != size:
            raise OSError(f"{key} has another size than it was said to have")
        return content, mark_of(facts)

    def _s3_pages(self) -> Iterator[list[Found]]:
        bucket, _, prefix = self._root.partition("/")
        asked: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "Delimiter": "/"}
        while True:
            page = self._asked(lambda: self._do(self._files.call_s3, "list_objects_v2", **asked))
            yield list(_customers(page.get("Contents", ()), lambda entry: entry["Key"]))
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def _asked(self, do: Callable[[], T]) -> T:
        try:
            return self.patience.attempt(do)
        except FileNotFoundError:
            self.patience.missing()
            raise InputError(f"{self.url}: there is no such place") from None

    def _do(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        # Of the others, which answer within this process or not at all, there is no time to be set.
        bound = {"timeout": TIMEOUT_S} if getattr(self._files, "async_impl", False) else {}
        return method(*arguments, **options, **bound)


def mark_of(facts: Mapping[str, Any]) -> bytes:
    """What tells a version of an object from another, `[16]` bytes, from what a store says of it.

    Args:
        facts: by name, of a listing or of the object alone.
    """
    tags = [str(facts[name]).strip('"') for name in TAGS if facts.get(name)]
    told = tags or [str(_plain(facts.get(name))) for name in (*TIMES, "size")]
    return hashlib.blake2b("\n".join(told).encode(), digest_size=16).digest()


def _plain(value: Any) -> Any:
    """A time as seconds: a list of fsspec's and the facts of one object may tell the same one in two ways."""
    return value.timestamp() if isinstance(value, datetime) else value


def _customers(listed: Iterable[Mapping[str, Any]], key_of: Callable[[Mapping[str, Any]], str]) -> Iterator[Found]:
    """Those of a list that are customers' objects; others are passed over."""
    for entry in listed:
        customer = customer_of(key_of(entry).rpartition("/")[2])
        if customer is not None and entry.get("type", "file") == "file":
            yield customer, mark_of(entry)
