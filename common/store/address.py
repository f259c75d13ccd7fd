"""Tells an address (``s3://bucket/folder``) from a path of this machine.

An option that takes either is a `Path`: pathlib makes one slash of the two, and `address_of` puts the other back.
"""

from __future__ import annotations

import re
from pathlib import Path

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
