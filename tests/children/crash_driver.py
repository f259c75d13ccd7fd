"""Stops the writing of shards at every single step, in a child, and lets the next run finish.

``python crash_driver.py FOLDER MODE SCENARIO`` prints one JSON object. It runs
the real plan, pipeline, writer and rewriter; clips and latents are drawn, because
what is on trial is what happens to files. One child is forked for each step:

    kill    half of a write reaches the file, then SIGKILL; other steps never happen
    full    from this step on the disk is full: every write, fsync and rename fails

Steps are every write to a file of the folder, and every fsync, rename, link and unlink.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogcommon.errors import DiskError
from cogcommon.model.families import BY_NAME, Resolution
from cogcommon.model.text_encoder import CaptionFacts
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import read_record
from cogprep.commands.verify import check_shard
from cogprep.dataset.lists import Sample
from cogprep.encode.decoding import Decoding
from cogprep.encode.outcome import Outcome
from cogprep.encode.pipeline import Pipeline
from cogprep.plan.folder import SPLITS, records_in, scan, split_folder
from cogprep.plan.holdout import Holdout, choose_holdout
from cogprep.plan.plan import Candidate, make_plan, with_keys
from cogprep.source.clip import Hashed
from cogprep.store.locks import ShardBusy
from cogprep.store.outlet import Outlet
from cogprep.store.rewrite import drop_samples, recover_folder
from cogprep.vae.encoder import Latents, Pending, generator_of
from cogprep.video.cut import Cut
from cogprep.video.decode import Clip

BUCKET = Resolution(9, 16, 16)
CLIPS = {"fresh": ["a", "b", "c", "d", "e"], "changed": ["a", "x", "e", "y", "z"]}


class DrawnLatents:
    def start(self, key: str, _frames: Any, _image: Any) -> Pending:
        shape = BY_NAME["5b"].latent(BUCKET)
        generator = generator_of(0, key, "test")
        tensors = {name: torch.randn(shape, generator=generator) for name in ("latent_mean", "latent_std")}
        return Pending(None, False, 0.0, lambda: Latents(tensors, False))


class DrawnText:
    def read(self, caption: str) -> tuple[torch.Tensor, CaptionFacts]:
        return torch.full((226, 64), float(len(caption))), CaptionFacts(3, False)


class InlinePool:
    workers = 1

    def run(self, _function: Any, tasks: Any, *, window: int) -> Any:
        for _task in tasks:
            yield Clip(np.zeros((9, 16, 16, 3), np.uint8), tuple(range(9)), 8.0, (0, 0, 16, 16), "bt709")


def bring_up_to_date(
    out: Path,
    contract: Contract,
    clips: list[str],
    still: Callable[[], bool] = lambda: True,
    outlet: Outlet | None = None,
    latents: DrawnLatents | None = None,
) -> Outcome:
    """What `encode` does to a folder, from the plan on.

    Args:
        still: whether the lists are as they were planned.
        outlet: where shards go from the folder.
        latents: what stands in for the VAE.
    """
    outlet = outlet or Outlet(out)
    for split in SPLITS:
        recover_folder(split_folder(out, split))
    candidates = [
        Candidate(Sample(line, f"caption {name}", f"{name}.mp4", ""), Hashed(1, 1, name.encode() * 32), b"")
        for line, name in enumerate(clips, 1)
    ]
    committed = scan(out)
    keys = with_keys(candidates, contract)
    held = committed.clips("val")
    present = {one.clip.sha256 for one in candidates}
    chosen = choose_holdout(1, Holdout(len(held), frozenset(held)), present, committed.clips("train"))
    splits = ["val" if one.clip.sha256 in chosen.clips else "train" for one in candidates]
    plan = make_plan(
        candidates, keys, splits, dict.fromkeys(keys, BUCKET), committed, bucket_order=[BUCKET], chunk={BUCKET: 2}
    )
    for drop in plan.drops:
        keep = lambda row, drop=drop: drop.keeps(row) or not still()  # noqa: E731
        with suppress(ShardBusy):
            outlet.prepare(split_folder(out, drop.split), drop.number, rewrite=True)
            drop_samples(split_folder(out, drop.split), drop.number, keep)
            outlet.publish(split_folder(out, drop.split), drop.number)
    outcome = Outcome()
    Pipeline(
        outlet=outlet,
        contract=contract,
        decoding=Decoding(Path("/nowhere"), Cut(), 8, InlinePool()),  # type: ignore[arg-type]
        latents=latents or DrawnLatents(),  # type: ignore[arg-type]
        text=DrawnText(),  # type: ignore[arg-type]
        outcome=outcome,
        advance=lambda: None,
    ).encode(plan.shards)
    return outcome


class Tap:
    """Counts steps, and strikes at one of them."""

    def __init__(self, folder: Path, strike: Callable[[int], None] | None, at: int) -> None:
        self.steps: list[str] = []
        self.folder = str(folder)
        self._strike, self._at = strike, at

    def step(self, name: str, half: Callable[[], None] = lambda: None) -> None:
        self.steps.append(name)
        if self._strike is not None and len(self.steps) > self._at:
            half()
            self._strike(self._at)

    def install(self) -> None:
        for name in ("fsync", "replace", "rename", "link", "unlink"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        opened, from_descriptor = io.open, os.fdopen
        io.open = lambda file, mode="r", *rest, **more: self._tapped(opened(file, mode, *rest, **more), str(file), mode)
        os.fdopen = lambda fd, mode="r", *rest, **more: self._tapped(
            from_descriptor(fd, mode, *rest, **more), str(Path(f"/proc/self/fd/{fd}").readlink()), mode
        )

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            self.step(name)
            return original(*args, **named)

        return counted

    def _tapped(self, file: Any, path: str, mode: str) -> Any:
        return TappedFile(file, self) if path.startswith(self.folder) and set(mode) & set("wa+") else file


class TappedFile:
    def __init__(self, file: Any, tap: Tap) -> None:
        self._file, self._tap = file, tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> TappedFile:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._tap.step("write", half)
        return self._file.write(data)


def kill(_at: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(_at: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(work: Callable[[], None]) -> int:
    """Fork, work, wait. 0 done, 2 a full disk, 9 killed, 1 anything else."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            work()
        except DiskError as error:
            code = 2 if "disk is full" in error.what else 3
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return -os.waitstatus_to_exitcode(status) if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def tars(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob("*.tar"))}


def faults(out: Path, contract: Contract) -> list[str]:
    """What is wrong with the committed shards."""
    return [
        f"{path}: {what}"
        for _, _, path in records_in(out)
        for what in check_shard(path.with_suffix(".tar"), read_record(path), contract)
    ]


def main(folder: Path, mode: str, scenario: str, contract: Contract) -> dict[str, Any]:
    start, whole, out = folder / "start", folder / "whole", folder / "out"
    start.mkdir()
    if scenario == "changed":
        bring_up_to_date(start, contract, CLIPS["fresh"])
    clips = CLIPS[scenario]
    shutil.copytree(start, whole)
    bring_up_to_date(whole, contract, clips)
    undisturbed = tars(whole)
    assert not faults(whole, contract)

    counted = folder / "steps.json"

    def count() -> None:
        tap = Tap(out, None, 0)
        tap.install()
        bring_up_to_date(out, contract, clips)
        counted.write_text(json.dumps(tap.steps))

    shutil.copytree(start, out)
    assert in_child(count) == 0
    steps = json.loads(counted.read_text())
    wrong = []
    lost = 0
    for at in range(len(steps)):
        shutil.rmtree(out)
        shutil.copytree(start, out)

        def disturbed(at: int = at) -> None:
            Tap(out, {"kill": kill, "full": disk_full}[mode], at).install()
            bring_up_to_date(out, contract, clips)

        code = in_child(disturbed)
        if code != {"kill": 9, "full": 2}[mode]:
            wrong.append(f"step {at} ({steps[at]}): the run ended with {code}")
        wrong += [f"step {at} ({steps[at]}): after the fault {what}" for what in faults(out, contract)]
        outcome = bring_up_to_date(out, contract, clips)
        if tars(out) != undisturbed:
            wrong.append(f"step {at} ({steps[at]}): the next run ends with other tars")
        left = [path.name for path in out.rglob("*") if path.is_file() and path.suffix not in (".tar", ".parquet")]
        if not all(name.endswith(".tmp") for name in left):
            wrong.append(f"step {at} ({steps[at]}): left behind {left}")
        lost = max(lost, outcome.encoded)
    return {"steps": steps, "wrong": wrong, "most_encoded_again": lost}


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, mode, scenario, contract_file = sys.argv[1:]
    given = Contract.from_json(Path(contract_file).read_bytes(), where=contract_file)
    given = dataclasses.replace(given, settings={"resolution": [str(BUCKET)]})
    print(json.dumps(main(Path(where), mode, scenario, given)))
