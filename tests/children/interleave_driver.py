"""Two commands on one folder: one is stopped at a question or commit, another runs to its end, the first goes on.

``python interleave_driver.py FOLDER CONTRACT EVERY SEED`` prints what was lost, as JSON. Commands and files are the
real ones; clips and latents are drawn. A command stops at the EVERY-th of its steps, counted over all runs: questions,
renames, links, removals, folders made, files made or locked. Where the second waits for the first, that goes on.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from crash_driver import BUCKET, bring_up_to_date, faults
from in_process import InlinePool

from cogcommon.errors import CogError
from cogcommon.files.locks import locked_elsewhere
from cogcommon.files.ownership import take_output
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import read_record
from cogprep.commands import clean_cache
from cogprep.commands.index import index
from cogprep.commands.preview import choose_samples
from cogprep.commands.verify import verify
from cogprep.plan import stale
from cogprep.plan.folder import check_contract, commit_contract, records_in
from cogprep.plan.origin import Origin
from cogprep.settings.shards import CleanSettings
from cogprep.store.locks import at_work, temporary_name
from cogprep.store.proof import A_PREVIEW, check_shards_output
from cogprep.store.shards import ShardWriter

stale.Pool = InlinePool  # type: ignore[attr-defined, assignment, misc]
ALL = ["a", "b", "c", "d", "e"]


class Folder:
    """An output folder with its data root, and the commands on it."""

    def __init__(self, top: Path, contract: Contract) -> None:
        self.root, self.out = top / "ds", top / "out"
        self.contract = contract
        self.empty = b"empty"

    def lay(self, names: list[str]) -> None:
        """Write the lists; each clip is one byte, known to the records by its size and time."""
        self.root.mkdir(exist_ok=True)
        for name in names:
            (self.root / f"{name}.mp4").write_bytes(b"x")
            os.utime(self.root / f"{name}.mp4", ns=(1, 1))
        (self.root / "videos.txt").write_text("".join(f"{name}.mp4\n" for name in names))
        (self.root / "prompts.txt").write_text("".join(f"caption {name}\n" for name in names))

    def listed(self) -> list[str]:
        return [line.removesuffix(".mp4") for line in (self.root / "videos.txt").read_text().split()]

    def encode(self) -> None:
        check_shards_output(self.out, "--out")
        with at_work(self.out):
            if check_contract(self.out, self.contract) is None:
                commit_contract(self.out, self.contract, self.empty)
            origin = Origin(str(self.root), "prompts.txt", "videos.txt", None, "")
            origin.write(self.out)
            planned = origin.state_of_lists()
            bring_up_to_date(self.out, self.contract, self.listed(), lambda: origin.state_of_lists() == planned)

    def clean(self, everything: bool = False) -> None:
        clean_cache.run(CleanSettings(out=self.out, all=everything, json=True))

    def index(self) -> None:
        index(self.out)

    def verify(self) -> None:
        verify(self.out)

    def preview(self) -> None:
        made = take_output(self.out / "preview", A_PREVIEW, "--to")
        made.commit_bytes("index.html", repr(choose_samples(list(records_in(self.out)), 3)).encode())

    def committed(self) -> dict[str, list[Any]]:
        """Names of the clips whose samples count: the shard that holds each, and its inode."""
        return {
            row.source.removesuffix(".mp4"): [str(path.with_suffix(".tar")), path.with_suffix(".tar").stat().st_ino]
            for _, _, path in records_in(self.out)
            if path.with_suffix(".tar").exists()
            for row in read_record(path).rows
            if row.status == "ok"
        }


class Stops:
    """Stops this process at one of its steps until it is told to go on; counts them all."""

    def __init__(self, at: int, stop: Callable[[bool], None]) -> None:
        self.steps = 0
        self._at, self._stop = at, stop
        self._asked = False
        builtins.input = self._question
        for name in ("replace", "rename", "link", "unlink", "mkdir", "rmdir"):
            setattr(os, name, self._counted(getattr(os, name)))
        opened, making = os.open, self._counted(os.open)
        os.open = lambda path, flags, *rest, **more: (making if flags & os.O_CREAT else opened)(
            path, flags, *rest, **more
        )
        fcntl.flock = self._counted(fcntl.flock)
        terminal = io.StringIO()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        sys.stdin = terminal

    def _question(self, _text: str) -> str:
        self._asked = True
        return self._counted(lambda: "y")()

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if self.steps == self._at:
                self._stop(self._asked)
            self.steps += 1
            return original(*arguments, **named)

        return counted


def in_child(work: Callable[[], None]) -> int:
    """0 done, 2 an error for the user, 1 anything else."""
    child = os.fork()
    if child == 0:
        os._exit(ending(work))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ending(work: Callable[[], None]) -> int:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            work()
    except CogError:
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def interleave(first: Callable[[], None], at: int, second: Callable[[], None]) -> tuple[bool | None, int, int]:
    """Whether the first command had asked its question at that step, None if it never came there; how both ended."""
    told, tells = os.pipe()
    waits, goes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told), os.close(goes)

        def stop(asked: bool) -> None:
            os.write(tells, bytes([asked]))
            os.read(waits, 1)

        Stops(at, stop)
        os._exit(ending(first))
    os.close(tells), os.close(waits)
    stopped = os.read(told, 1)

    def meanwhile() -> None:
        sleep = time.sleep

        def wait(seconds: float) -> None:
            os.write(goes, b"x")
            sleep(seconds)

        time.sleep = wait
        second()

    code = in_child(meanwhile) if stopped else 0
    os.close(goes)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(told)
    return (bool(stopped[0]) if stopped else None), status, code


def wrong_after(
    folder: Folder, before: dict, between: dict, contract: Contract, everything: tuple[bool, bool], asked: bool
) -> list:
    """What the two commands lost or left half.

    Args:
        before, between: what counted when the first was stopped, and when the second had ended.
        everything: whether the first, the second, was to remove everything.
        asked: whether the first was stopped at its question or later.
    """
    after, wanted = folder.committed(), set(folder.listed())
    found = faults(folder.out, contract)
    if list(records_in(folder.out)):
        told = ("contract.json", "origin.json", "empty_caption.safetensors")
        found += [f"shards without {name}" for name in told if not (folder.out / name).exists()]
    kept = {} if everything[1] else dict(before)  # the second was told to remove these
    kept |= between
    if everything[0]:  # the first was told to remove what was there when it asked
        kept = {name: place for name, place in between.items() if asked and place not in before.values()}
    return found + [f"{name} is lost" for name in sorted(wanted & kept.keys() - after.keys())]


def main(top: Path, contract: Contract, every: int, seed: int) -> dict[str, Any]:
    start, here = top / "start", top / "here"
    for name in (start, here):
        name.mkdir()
    folder = Folder(start, contract)
    folder.lay(ALL)
    folder.encode()
    for name in ("out", "ds"):  # it remembers the data root of the copies
        shutil.move(start / name, here / name)
    folder = Folder(here, contract)
    Origin(str(folder.root), "prompts.txt", "videos.txt", None, "").write(folder.out)
    # A run was killed before a record, another while it wrote; a line is gone, and one is new.
    (folder.out / "000001.parquet").unlink()
    writer = ShardWriter(folder.out, 7, contract, ())
    writer._stream.write(b"half")
    writer.abandon()
    # Not one that is held out: another would be held out in its place.
    gone = next(name for name, (tar, _) in folder.committed().items() if "/val/" not in tar)
    lines = [name for name in ALL if name != gone]
    folder.lay([*lines, "x"])
    shutil.rmtree(start)
    shutil.copytree(here, start)

    commands = {
        "encode": folder.encode,
        "clean": folder.clean,
        "clean --all": lambda: folder.clean(True),
        "index": folder.index,
        "verify": folder.verify,
        "preview": folder.preview,
    }
    wrong, runs, turn = [], 0, seed
    for first in ("encode", "clean", "clean --all", "index", "preview"):
        for second in commands:
            for restored in (False, True):
                at = turn % every
                turn += 1
                while True:
                    shutil.rmtree(here)
                    shutil.copytree(start, here)
                    found = trial(folder, commands, first, second, at, gone if restored else "", top / "between.json")
                    if found is None:  # the first command has fewer steps
                        break
                    named = f"{first} stopped at step {at}, {second}{', its line restored' * restored}"
                    wrong += [f"{named}: {what}" for what in found]
                    runs += 1
                    at += every
    return {"runs": runs, "wrong": wrong}


def trial(
    folder: Folder, commands: dict[str, Callable[[], None]], first: str, second: str, at: int, restored: str, seen: Path
) -> list[str] | None:
    """What is wrong after the first command was stopped, the second ended, and the first went on.

    Args:
        restored: a clip whose line comes back while the first is stopped; empty for none.
        seen: a file for what the second has seen.
    """

    def meanwhile() -> None:
        going, before = False, folder.committed()
        if restored in before:
            # The first has looked at this shard again, locked, and takes the sample out: too late to come back.
            tar = Path(before[restored][0])
            going = locked_elsewhere(tar.with_name(temporary_name(int(tar.stem))))
        if restored:
            folder.lay([*ALL, "x"])
        try:
            commands[second]()
        finally:
            seen.write_text(json.dumps([before, folder.committed(), going]))

    asked, *codes = interleave(commands[first], at, meanwhile)
    if asked is None:
        return None
    before, between, going = json.loads(seen.read_text())
    if going:
        before, between = ({n: p for n, p in known.items() if n != restored} for known in (before, between))
    everything = (first.endswith("--all"), second.endswith("--all"))
    ended = [f"it ended with {codes}"] if 1 in codes else []
    return ended + wrong_after(folder, before, between, folder.contract, everything, asked)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, contract_file, every_, seed_ = sys.argv[1:]
    given = Contract.from_json(Path(contract_file).read_bytes(), where=contract_file)
    given = dataclasses.replace(
        given, settings={**given.settings, "resolution": [str(BUCKET)]}, empty_caption_sha256=""
    )
    print(json.dumps(main(Path(where), given, int(every_), int(seed_))))
