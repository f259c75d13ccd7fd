"""What all processes of a run must have in common, asked before any of them loads a weight.

Rank 0 says what it has, and every rank compares. A run whose processes differ would train, and end well, with weights
that belong to no run: each of them averages its gradients with the others', whatever it has computed them from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon import __version__
from cogcommon.errors import RunError

from ..data.repeats import described
from ..distributed.peers import Peers
from ..distributed.zero_config import deepspeed_config
from .checkpoint import SavedCheckpoint, find_checkpoint

if TYPE_CHECKING:
    from .run import Run

_LIBRARIES = ("torch", "diffusers", "peft", "accelerate", "deepspeed", "safetensors")  # what computes, moves and saves
# Where something lies on a host is that host's own affair; what lies there is compared by its content.
_PLACES = {
    "cache",
    "config",
    "deepspeed",
    "init_lora",
    "mirror",
    "model",
    "nvme",
    "out",
    "repeat",
    "resume",
    "shards",
    "validate_image",
    "validate_prompts",
    "validate_shards",
}
_TOKEN = ".ranks-{}.tmp"  # in the run folder; one that a killed run left is cleared with what is half-written
# Seconds until what rank 0 has written must be seen: a network file system's client may hold an older state of a
# folder; processes of one machine share what it holds.
_SEEN_ELSEWHERE, _SEEN_HERE = 30.0, 3.0
_SHARED = (
    "give --out in a folder that all hosts share (NFS, Lustre, a volume mounted by every pod), and start all processes "
    "in the same working folder"
)


def check_ranks_alike(run: Run, peers: Peers) -> None:
    """Refuse processes that would not train the same thing; every rank calls it.

    Raises:
        RunError: names what differs, with both values.
    """
    if peers.world == 1:
        return
    theirs = peers.broadcast(_facts(run))
    mine = _facts(run)
    differing = [
        f"{name} {_short(theirs[name])} there, {_short(mine[name])} here" for name in mine if mine[name] != theirs[name]
    ]

    def compare() -> None:
        if differing:
            raise RunError(
                f"this process would train something else than process 0: {'; '.join(differing[:4])}",
                where=f"here on {peers.node.host}, there on {peers.nodes[0].host}",
                fix="start all processes with the same command, shards and versions (constraints.txt)",
            )

    peers.together(compare)


def _facts(run: Run) -> dict[str, Any]:
    settings = json.loads(json.dumps(dataclasses.asdict(run.settings), default=str))
    file = deepspeed_config(run.settings, run.strategy, run.precision, run.world)
    return {
        "cogtune": __version__,
        **{library: _version(library) for library in _LIBRARIES},
        "method": run.method.name,
        "--shards": run.shards.fingerprint,
        "--validate-shards": run.held_out.fingerprint if run.held_out else None,
        "--repeat": described(run.sampler.times),
        "base model": run.checkpoint.fingerprint,
        "--validate-prompt, --validate-image": [prompt.name for prompt in run.prompts],
        "steps": run.steps,
        "checkpoint to go on from": run.resume.digest if run.resume else None,
        "--strategy": run.strategy,
        "--precision": run.precision,
        "DeepSpeed's settings": hashlib.sha256(json.dumps(file, sort_keys=True, default=str).encode()).hexdigest(),
        "--init-lora": run.method.resume_facts().get("--init-lora"),
        **{run.settings.option(name): value for name, value in settings.items() if name not in _PLACES},
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text[:12] if len(text) == 64 else text


def agree_on_resume(find_own: Callable[[], SavedCheckpoint | None], peers: Peers) -> SavedCheckpoint | None:
    """The checkpoint from which rank 0 goes on, as every rank finds it; every rank calls this.

    Raises:
        RunError: a rank does not see it, or sees another one under its name.
    """
    found = peers.together(lambda: find_own() if peers.main else None)
    told = peers.broadcast((str(found.folder), found.digest) if found else None)
    if told is None:
        return None
    folder, digest = Path(told[0]), told[1]

    def look() -> SavedCheckpoint:
        seen = _wait_for(folder, lambda: (own := _find(folder)) and own.digest == digest and own, peers)
        if not seen:
            what = "another checkpoint" if _find(folder) else "no checkpoint"
            raise RunError(
                f"process 0 goes on from {folder}, and this process sees {what} there", where=str(folder), fix=_SHARED
            )
        return seen

    return peers.together(lambda: found if peers.main else look())


def _find(folder: Path) -> SavedCheckpoint | None:
    try:
        return find_checkpoint(folder)
    except RunError:
        return None


def check_shared(folder: Path, peers: Peers) -> None:
    """Refuse a run folder that not every rank shares with rank 0, which has made it; every rank calls this.

    Raises:
        RunError: a rank does not see what rank 0 has written there.
    """
    if peers.world == 1:
        return
    file = folder / peers.broadcast(_TOKEN.format(secrets.token_hex(16)))
    try:
        if peers.main:
            file.touch()
        peers.barrier()
        peers.together(lambda: _see(file, peers))
    finally:
        if peers.main:
            file.unlink(missing_ok=True)


def _see(file: Path, peers: Peers) -> None:
    if not peers.main and not _wait_for(file, file.exists, peers):
        raise RunError(
            "the run folder is not shared: this process does not see what process 0 has written there",
            where=str(file.parent.absolute()),
            fix=_SHARED,
        )


def _wait_for(path: Path, look: Callable[[], Any], peers: Peers) -> Any:
    """What ``look`` gives once it is true, or its last answer."""
    here = peers.node.machine == peers.nodes[0].machine
    until = time.monotonic() + (_SEEN_HERE if here else _SEEN_ELSEWHERE)
    while not (seen := look()) and time.monotonic() < until:
        time.sleep(0.2)
        for folder in path.absolute().parents:  # reading a folder makes NFS ask the server for its state
            if folder.is_dir():
                next(folder.iterdir(), None)
                break
    return seen
