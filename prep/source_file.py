"""Checks and hashes a file of the lists before a decoder opens it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cogcommon.regular_file import Missing, Unreadable, check_regular

from .clip import BadClip
from .near import near


def hash_file(path: Path) -> bytes:
    """sha256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def refuse_special(path: Path) -> os.stat_result:
    """See `check_regular`; of a missing file, what lies near it is named.

    Raises:
        BadClip: missing, unreadable, empty, or no regular file.
    """
    try:
        return check_regular(path)
    except Missing as error:
        raise BadClip("; ".join(filter(None, [str(error), near(path)]))) from None
    except Unreadable as error:
        raise BadClip(str(error)) from error
