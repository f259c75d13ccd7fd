"""Addresses in lists: told from paths, and named without what opens them."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from cogcommon.store.store import is_web, without_secrets

_ADDRESS = re.compile(r"(?<![^/])([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])")  # pathlib makes one slash of two
_OF_THIS_MACHINE = {"file", "local"}
# Of a signed URL: what signs it, and for how long. The rest of a query may say which object is meant.
_SIGNS = re.compile(
    r"x-(amz|goog)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|sig|s[evprtk]|ske|skt|skoid|"
    r"sktid|sks|skv|spr|sig|token|access_token",
    re.IGNORECASE,
)
_SIGNED = "COGPREP_SIGNED_CLIPS"  # of the environment: decode processes inherit it


def any_remote(paths: Iterable[Path]) -> bool:
    """Whether one of these is behind an address."""
    return any(remote_address(path) is not None for path in paths)


def remote_address(path: Path) -> str | None:
    """The address that a path of a data root and an entry of its lists names; None of a file of this machine.

    A path that begins as an address is one, whatever reads it; inside a path only what fsspec knows is.
    """
    text = str(path)
    if ":/" not in text:  # all but a few of a million
        return None
    found = [one for one in _ADDRESS.finditer(text.partition("?")[0]) if _is_scheme(one[1].lower(), one.start())]
    return f"{found[-1][1].lower()}://{text[found[-1].end() :]}" if found else None


def _is_scheme(name: str, at: int) -> bool:
    from fsspec.registry import known_implementations, registry

    return name not in _OF_THIS_MACHINE and (not at or name in known_implementations or name in registry)


def named_without_secrets(entries: Sequence[str]) -> list[str]:
    """Entries of a list as they may be told and recorded: signed URLs without what signs them.

    What signs is kept for as long as this process lives, in a file that only its owner can read: decode processes need
    it, too. Two that differ in the rest of their queries stay two.
    """
    signed = {}
    names = []
    for entry in entries:
        name = entry
        if is_web(entry) and without_secrets(entry) != entry:
            rest = [pair for pair in parse_qsl(urlsplit(entry).query) if not _SIGNS.fullmatch(pair[0])]
            name = without_secrets(entry)
            if rest:
                name += f"?{hashlib.sha256(repr(rest).encode()).hexdigest()[:8]}"
            fragment = entry.rpartition("#t=")
            name += f"#t={fragment[2]}" if fragment[1] else ""
            signed[remote_address(Path(name.partition("#")[0])) or name] = entry.partition("#")[0]
        names.append(name)
    if signed:
        _keep(signed)
    return names


def _keep(signed: Mapping[str, str]) -> None:
    known = {**_signed(os.environ.get(_SIGNED, "")), **signed}
    descriptor, name = tempfile.mkstemp(prefix="cogprep-")
    atexit.register(lambda: Path(name).unlink(missing_ok=True))
    with os.fdopen(descriptor, "w") as stream:
        json.dump(known, stream)
    os.environ[_SIGNED] = name


def any_signed() -> bool:
    """Whether this process, and those that it starts, were given addresses that are signed."""
    return _SIGNED in os.environ


def in_full(name: str) -> str:
    """The address that a name stands for, with what signs it."""
    return _signed(os.environ.get(_SIGNED, "")).get(name, name)


@lru_cache(maxsize=4)
def _signed(file: str) -> dict[str, str]:
    try:
        return {str(name): str(address) for name, address in json.loads(Path(file).read_bytes()).items()}
    except (OSError, ValueError):
        return {}
