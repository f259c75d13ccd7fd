"""What a person may have meant by the name of a folder that is not there."""

from __future__ import annotations

import os
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

_MOST = 20_000  # names of a folder that are looked at


def folders_like(path: Path) -> str:
    """What folders beside a missing one have names like its: ``did you mean holiday?``; empty where none has."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _MOST) if entry.is_dir()]
    except (OSError, ValueError):
        return ""
    meant = [str(path.with_name(name)) for name in get_close_matches(path.name, names)]
    return f"did you mean {' or '.join(meant)}?" if meant else ""
