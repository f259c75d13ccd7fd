"""Tells an address (``s3://bucket/folder``) from a path of this machine.

An option that takes either is a `Path`: pathlib makes one slash of the two, and `address_of` puts the other back.
"""

from __future__ import annotations

import re
from pathlib import Path

# What reads a kind of address through fsspec: the module, what installs it, and our extra where there is one.
READERS = {
    "s3": ("s3fs", "s3fs", "s3"),
    "s3a": ("s3fs", "s3fs", "s3"),
    "gs": ("gcsfs", "gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcsfs", "gcs"),
    "hf": ("huggingface_hub", "huggingface_hub", "hf"),
    "abfs": ("adlfs", "adlfs", ""),
    "az": ("adlfs", "adlfs", ""),
}
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])(.*)", re.DOTALL)


def address_of(place: Path | str) -> str | None:
    """The address that an option names, without a slash at its end; None where it names a path."""
    match = _ADDRESS.fullmatch(str(place))
    return f"{match[1].lower()}://{match[2].rstrip('/')}" if match else None


def as_shown(place: Path | str) -> str:
    """A place as messages and records name it: an address with both slashes, and without what opens it."""
    from .store import without_secrets

    address = address_of(place)
    return str(place) if address is None else without_secrets(address)
