"""URLs of customers: which are understood, which package opens each, and the file system behind it."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qrlora_deploy.errors import InputError, MissingPartError, first_line
from qrlora_deploy.installation.parts import need


@dataclass(frozen=True)
class Kind:
    """How URLs of a protocol are opened.

    Attributes:
        module: that fsspec needs; empty: none.
        options: of the file system.
    """

    module: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


# Without botocore's own attempts: those of `Bucket` are enough, and of theirs a request would wait ten seconds.
S3 = Kind("s3fs", {"config_kwargs": {"connect_timeout": 5, "read_timeout": 15, "retries": {"max_attempts": 0}}})
GOOGLE, AZURE = Kind("gcsfs"), Kind("adlfs")

KINDS: Mapping[str, Kind] = {
    "s3": S3,
    "s3a": S3,
    "gs": GOOGLE,
    "gcs": GOOGLE,
    "az": AZURE,
    "abfs": AZURE,
    "abfss": AZURE,
    "file": Kind(),
    "memory": Kind(),
}
"""By protocol. Others of fsspec either list no folders or run what a URL names, such as an archive or a cache."""

SCHEME = re.compile(r"([a-z0-9]+)://(.*)", re.DOTALL)
PLAIN = re.compile(r"[A-Za-z0-9._~/+=,()!-]+")
"""What stands behind the protocol. No `@`: keys of a store do not belong into a URL, which logs show."""


def is_url(text: str) -> bool:
    """Whether a place is a URL and not a path."""
    return "://" in text


def check_url(url: str) -> Kind:
    """Make sure that a URL can be opened here; nothing is opened yet.

    Raises:
        InputError: it is of no protocol that is understood, or holds more than a bucket and a prefix.
        MissingPartError: a package is not installed.
    """
    found = SCHEME.fullmatch(url)
    if found is None or found[1] not in KINDS:
        raise InputError(f"{url!r:.200} is no place of customers: give a folder, or a URL of {', '.join(KINDS)}")
    if not PLAIN.fullmatch(found[2]):
        raise InputError(
            f"{found[1]}://... holds more than a bucket and a prefix; keys of a store come from the environment"
        )
    need("store", f"a place such as {found[1]}://...")
    kind = KINDS[found[1]]
    if kind.module and importlib.util.find_spec(kind.module) is None:
        raise MissingPartError(
            f"{found[1]}://... needs {kind.module}, which is not installed; pip install {kind.module}", name=kind.module
        )
    return kind


def open_place(url: str) -> tuple[Any, str]:
    """The file system of a URL, without a cache of listings, and the path of the customers in it.

    Raises:
        InputError: as `check_url`, or the file system cannot be made, such as for want of keys.
    """
    kind = check_url(url)
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **kind.options)
    except Exception as error:
        raise InputError(f"{url} cannot be opened: {first_line(error)}") from error
    return files, root.rstrip("/")
