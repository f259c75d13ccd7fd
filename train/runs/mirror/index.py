"""``mirror.json``, which says what a mirror holds, and in a run's folder which run that is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cogcommon.errors import RunError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.typed import build, parse_object
from cogcommon.store.remote_folder import RemoteFolder

from ..checkpoint import CHECKPOINT_NAME, step_of
from ..folder import MIRROR_FILE

_SCHEMA = 1
ELSEWHERE = "name an address of its own: --mirror s3://bucket/runs/another"


@dataclass(frozen=True)
class MirroredFile:
    """A file of a checkpoint, as it was uploaded."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """``mirror.json``: what a mirror holds.

    Args:
        run: whose it is; the run's own folder says the same.
        holder: the process that uploads. One that has restored the run elsewhere takes the mirror over.
        checkpoints: the files of each that is whole, by their names.
        best: the step that --keep-best keeps.
        files: what else was uploaded: a hash of each, by name.
        leaving: objects that are about to be removed; a kill may have left them.
    """

    run: str
    holder: str
    checkpoints: Mapping[str, Mapping[str, MirroredFile]] = field(default_factory=dict)
    best: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    leaving: Sequence[str] = ()
    schema: int = _SCHEMA

    @property
    def names(self) -> list[str]:
        """Of its checkpoints, oldest first."""
        return sorted(self.checkpoints, key=lambda name: step_of(Path(name)))

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def read_index(remote: RemoteFolder) -> Index | None:
    """What a mirror says of itself; None where there is none.

    Raises:
        RunError: it cannot be believed.
        StoreError: it cannot be read, and why.
    """
    raw = remote.read(MIRROR_FILE)
    if raw is None:
        return None
    try:
        values = parse_object(raw)
        if values.get("schema") != _SCHEMA:
            raise ValueError(f"schema {values.get('schema')}, this version reads {_SCHEMA}")
        index = build(Index, values)
        names = [*index.checkpoints, *(file for files in index.checkpoints.values() for file in files), *index.files]
        if bad := [name for name in names if name.startswith("/") or ".." in name.split("/") or "\0" in name]:
            raise ValueError(f"{bad[0]!r} is no name of a file in it")
        if odd := [name for name in index.checkpoints if not CHECKPOINT_NAME.fullmatch(name)]:
            raise ValueError(f"{odd[0]!r} is no name of a checkpoint")
        return index
    except ValueError as error:
        raise RunError(
            f"the mirror's index is damaged: {error}", where=remote.name(MIRROR_FILE), fix=ELSEWHERE
        ) from error


def run_of(folder: Path) -> str | None:
    """Which run a folder holds, as its mirror knows it; None where it has none."""
    return str(token["run"]) if "run" in (token := _token(folder)) else None


def is_copy(folder: Path) -> bool:
    """Whether a folder was brought from a mirror to be used, and no run was made in it."""
    return bool(_token(folder).get("copy"))


def _token(folder: Path) -> dict[str, Any]:
    try:
        return parse_object((folder / MIRROR_FILE).read_bytes())
    except (OSError, ValueError):
        return {}


def write_token(folder: Path, run: str, shown: str, *, copy: bool = False) -> None:
    """Say in a folder which run it holds, for `run_of`, where that is mirrored, and whether it is a copy (`is_copy`)
    or the run's home."""
    told = {"run": run, "at": shown, **({"copy": True} if copy else {})}
    commit_bytes(folder / MIRROR_FILE, json.dumps(told).encode())


def without(index: Index, name: str) -> dict[str, Mapping[str, MirroredFile]]:
    return {other: files for other, files in index.checkpoints.items() if other != name}
