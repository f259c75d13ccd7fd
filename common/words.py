"""Counts, times and sizes as people say them."""

from __future__ import annotations

import re
from collections.abc import Iterable

GIB = 2**30  # bytes


def counted(count: int, noun: str, plural: str = "") -> str:
    """``1 clip``, ``1,200 clips``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def did_you_mean(meant: Iterable[object], advice: str = "") -> str:
    """``did you mean holiday or holidays? give the folder of a run``; where nobody can tell, the advice alone.

    Args:
        meant: what may have been meant, the likeliest first.
        advice: what to type in any case.
    """
    names = " or ".join(map(str, meant))
    return " ".join(filter(None, [f"did you mean {names}?" if names else "", advice]))


def in_words(seconds: float) -> str:
    """A time: 4.0 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def in_bytes(size: float) -> str:
    """A size as disks are labelled: powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def in_gib(size: float) -> str:
    """A size of memory, as its makers and drivers tell it: powers of 1024."""
    return f"{size / GIB:.1f} GiB"


def bytes_of(text: str) -> int | None:
    """Bytes of a size as people type it, 500MB or 2 g, in powers of 1000; None where it is no size."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kMGT]?)B?\s*", text, re.IGNORECASE | re.ASCII)
    if not match:
        return None
    size = float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " ")
    return int(size) or None


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says; the name of its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
