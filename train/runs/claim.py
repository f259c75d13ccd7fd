"""Takes a run's folder: a new one, a run's own from before, or that of a run older than records.

Until there were records (`cogcommon.files.ownership`), a run's folder held nothing that named its files. Its
settings and its facts prove it; of its files those become the run's that say of themselves what they are. All
others count as somebody's.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cogcommon.cli.names import command_line, plain
from cogcommon.errors import CogError, RunError
from cogcommon.files.failures import disk_errors
from cogcommon.files.locks import Busy, NoLocks, lock, open_locked
from cogcommon.files.ownership import (
    RECORD_FILE,
    Made,
    check_own_folder,
    is_file,
    is_folder,
    record_of,
    refuse_data_root,
    refuse_other,
    take_output,
)
from cogcommon.files.typed import build, parse_object

from ..model import lora, sft
from ..model.lora_file import read_facts
from .checkpoint import check_newest, checkpoint_name, clear, list_checkpoints, read_state
from .config import write_config
from .folder import (
    A_CHECKPOINT,
    A_RUN,
    CONFIG_FILE,
    FACTS_FILE,
    LOCK_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RUN_FILES,
    VALIDATION,
    RunFacts,
    StepLine,
    ValidationLine,
    drawn_prompts,
    drawn_step,
    forget_stop,
    report_head,
    run_facts,
    trained_settings,
)
from .log import cut_metrics

if TYPE_CHECKING:
    from .run import Run

# What `Runtime.save_state` writes, and DeepSpeed; what diffusers writes.
_OF_A_CHECKPOINT = re.compile(
    r"state\.json|(weights|average)\.safetensors|optimizer\.pt|zero_to_\w+\.py|state/\w+_states\.pt", re.ASCII
)
_OF_A_TRANSFORMER = re.compile(
    r"config\.json|diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", re.ASCII
)


def check_claimable(folder: Path) -> None:
    """Refuse a folder that `claimed` would, before anything is waited for; nothing is written.

    Raises:
        SettingError: it holds files that no run of ours has made.
    """
    if os.path.lexists(folder / RECORD_FILE) or _facts(folder) is None:
        check_own_folder(folder, A_RUN, "--out")


@contextmanager
def claimed(folder: Path, wait: float = 0.0) -> Iterator[Made]:
    """Make the run's folder ours, and keep other processes from training in it. The lock ends with the process.

    Args:
        wait: seconds in which another process that trains in it may end.

    Raises:
        SettingError: it holds files that no run of ours has made.
        RunError: another process trains in it.
        DiskError: it cannot be made.
    """
    try:
        with disk_errors(folder):
            _adopt(folder)
            _begin_record(folder)
            lock = _locked(folder, wait)
    except NoLocks:
        print(plain(f"note: no locks here, so nothing keeps a second run out of {folder}"), file=sys.stderr)
        lock = io.BytesIO()
    except Busy:
        gone = f"; where its host is gone for good, and its lock is not: {command_line('rm', folder / LOCK_FILE)}"
        raise RunError(
            "another process trains in this folder", where=str(folder), fix="give another --out" + gone * bool(wait)
        ) from None
    with lock:
        with disk_errors(folder):
            made = take_output(folder, A_RUN, "--out")
            made.open(*RUN_FILES)
            refuse_other(folder / sft.FOLDER, sft.A_TRANSFORMER)
        try:
            forget_stop(folder)  # whom it asked has ended
            yield made
        finally:
            with suppress(OSError):  # a full disk: the files stay open
                forget_stop(folder)
                (Made.read(folder) or made).close(*RUN_FILES)


def move_in(run: Run, folder: Path, done: int, *, aside: bool, kept: bool = False) -> list[str]:
    """Bring a claimed folder into the state after step ``done``; names of later checkpoints, which are gone.

    Args:
        aside: whether those are only set aside until there is a new one (`checkpoint.clear`).
        kept: its settings stay as they are written there.

    Raises:
        PeerLost: another process has gone on in it, after this one had looked for the newest checkpoint.
    """
    if run.resume is None:
        looked = run.given.resume == "auto"
    else:  # of another folder's checkpoints the newest says nothing of this one
        looked = run.resume.newest and run.resume.folder.parent.samefile(folder)
    if looked:
        check_newest(folder, run.resume)
    if not kept:
        write_config(run, folder)
    cut_metrics(folder, done)
    _cut_videos(folder, done)
    return clear(folder, after=done, aside=aside)


def _cut_videos(folder: Path, step: int) -> None:
    """Remove validation's videos of steps after ``step``, which would pass for those of the steps that are made now.

    They are the files that the run itself writes over when it comes there; what else lies beside them stays.
    """
    prompts = drawn_prompts(folder)
    for path in (folder / VALIDATION).glob("step-*/*.mp4"):
        ours = is_file(path) and is_folder(path.parent) and (path.stem in prompts or re.fullmatch("[0-9]+", path.stem))
        if ours and drawn_step(path.parent) > step:
            path.unlink()
            with suppress(OSError):
                path.parent.rmdir()


def _begin_record(folder: Path) -> None:
    """Write a record where there is none, so that the lock can lie in the folder; all else waits until that is ours.

    Hosts may begin in one folder at the same moment: none writes over what another has recorded.
    """
    if check_own_folder(folder, A_RUN, "--out") is None:
        folder.mkdir(parents=True, exist_ok=True)
        Made(folder, A_RUN, files={name: [] for name in RUN_FILES}).write(exclusive=True)


def _locked(folder: Path, wait: float) -> IO[bytes]:
    """The folder's lock.

    Raises:
        Busy: another process has had it for ``wait`` seconds.
    """
    until, told = time.monotonic() + wait, False
    while True:
        try:
            return open_locked(folder / LOCK_FILE)
        except Busy:
            if time.monotonic() >= until:
                raise
        if not told:
            print(plain(f"waits for another process to be done with {folder}"), file=sys.stderr, flush=True)
            told = True
        time.sleep(0.5)


def _adopt(folder: Path) -> None:
    """Write the records of a run's folder that is older than records.

    Raises:
        Busy: an older version of the program trains in it.
        SettingError: it is a data root, too.
    """
    if os.path.lexists(folder / RECORD_FILE) or (facts := _facts(folder)) is None:
        return
    refuse_data_root(folder, "--out")
    descriptor = os.open(folder, os.O_RDONLY)  # which older versions have locked
    try:
        with suppress(NoLocks):
            lock(descriptor, folder)
        for path in list_checkpoints(folder):
            if _is_checkpoint(path):
                _seal(path, A_CHECKPOINT, _OF_A_CHECKPOINT)
        if facts.method == "sft" and _is_transformer(folder / sft.FOLDER):
            _seal(folder / sft.FOLDER, sft.A_TRANSFORMER, _OF_A_TRANSFORMER)
        # Last of all, so that a kill before it leaves the rest to the next run.
        record_of(folder, A_RUN, lambda name: name in RUN_FILES and _is_runs(folder / name, facts)).write()
    finally:
        os.close(descriptor)


def _seal(folder: Path, by: str, names: re.Pattern[str]) -> None:
    if not os.path.lexists(folder / RECORD_FILE):
        record_of(folder, by, lambda name: names.fullmatch(name) is not None and _is_as_named(folder / name)).write()


def _is_as_named(path: Path) -> bool:
    """Whether a file is of the kind that its name says: JSON, tensors, torch's archive, DeepSpeed's script."""
    if not is_file(path):
        return False
    with path.open("rb") as stream:
        begin = stream.read(9)
    if path.suffix == ".py":
        return b"DeepSpeed Team" in path.read_bytes()
    if path.suffix == ".safetensors":  # the size of its header, then the header
        return begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < path.stat().st_size
    return begin.startswith(b"PK\x03\x04" if path.suffix == ".pt" else b"{")


def _facts(folder: Path) -> RunFacts | None:
    """The facts of a run; None unless its settings and facts say that it is one."""
    config = folder / CONFIG_FILE
    try:
        if not is_file(config) or not is_file(folder / FACTS_FILE):
            return None
        heading = re.match(rb"# cogtrain (lora|sft) --config \S", config.read_bytes())
        facts = run_facts(folder)
        if heading is None or heading[1].decode() != facts.method:
            return None
        trained_settings(folder, facts.method)
        return facts
    except (OSError, ValueError, CogError):
        return None


def _is_checkpoint(folder: Path) -> bool:
    try:
        return is_folder(folder) and checkpoint_name(read_state(folder).step) == folder.name
    except (OSError, ValueError):
        return False


def _is_transformer(folder: Path) -> bool:
    try:
        config = parse_object((folder / "config.json").read_bytes())
        return is_folder(folder) and config.get("_class_name") == "CogVideoXTransformer3DModel"
    except (OSError, ValueError):
        return False


def _is_runs(path: Path, facts: RunFacts) -> bool:
    """Whether a file of a run's folder is what its name says, of this run."""
    try:
        if not is_file(path):
            return False
        if path.name == METRICS_FILE:
            return _are_metrics(path.read_text(encoding="utf-8"))
        if path.name == REPORT_FILE:
            page = path.read_text(encoding="utf-8")
            return page.startswith(report_head(facts)) and page.endswith("</body></html>\n")
        if path.name == lora.FILE:
            return read_facts(path).get("shards") == facts.shards_fingerprint
        return path.name == FACTS_FILE
    except (OSError, ValueError, CogError):
        return False


def _are_metrics(text: str) -> bool:
    """Whether all lines are a run's; a kill may have cut the last one short."""
    *lines, rest = text.split("\n")
    begins = '{"step": '
    if not rest.startswith(begins[: len(rest)]):
        return False
    for line in lines:
        values = parse_object(line)
        build(ValidationLine if "val_loss" in values else StepLine, values)
    return bool(lines)  # an empty file says nothing of who made it
