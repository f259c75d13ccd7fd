"""Killed at any moment: nothing is lost or doubled, and the next run ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogcommon.records import read_record
from cogprep.extents import whole_extents
from cogprep.verify import verify

DRIVER = Path(__file__).with_name("crash_driver.py")


def tars(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob("*.tar"))}


@pytest.mark.parametrize("scenario", ["fresh", "changed"])
@pytest.mark.parametrize("mode", ["kill", "full"])
def test_a_fault_at_every_write_fsync_and_rename(mode, scenario, encoded, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, str(DRIVER), str(work), mode, scenario, str(encoded / "out" / "contract.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert {"write", "fsync", "replace"} <= set(result["steps"]) and len(result["steps"]) > 20
    if scenario == "changed":
        assert "unlink" in result["steps"]


def command_line(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "cogprep", "encode", "--data-root", str(folder / "ds"), "--out", str(folder / "new"),
        "--resolution", "9x64x96", "--model", "tiny", "--shard-samples", "2", "--workers", "1", *more,
    ]  # fmt: skip


def start(folder: Path, *more: str) -> subprocess.Popen:
    """`cogprep encode` in a process group of its own, so that its decode children can be killed with it."""
    return subprocess.Popen(
        command_line(folder, *more), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def kill_group(process: subprocess.Popen) -> bool:
    """Kill it with its children; gives whether it was still running."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    return running


def finish(folder: Path, *more: str) -> dict:
    done = subprocess.run(command_line(folder, "--json", *more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def samples_on_disk(out: Path) -> int:
    """Samples that need not be encoded again: committed, or whole in a temporary tar or a tar without record."""
    count = 0
    for path in out.rglob("*.parquet"):
        count += sum(row.status == "ok" for row in read_record(path).rows)
    for path in [*out.rglob(".*.tar.tmp"), *out.rglob("[0-9]*.tar")]:
        if path.name.startswith(".") or not path.with_suffix(".parquet").exists():
            with path.open("rb") as stream:
                count += sum(1 for _ in whole_extents(stream))
    return count


def kill_at_random(folder: Path, undisturbed: dict[str, str], kills: int, seed: int) -> None:
    """Kill runs until ``kills`` of them were killed; every folder is then finished and compared."""
    draw = random.Random(seed)
    out = folder / "new"
    begun = time.monotonic()
    finish(folder)
    usual = time.monotonic() - begun
    assert tars(out) == undisturbed
    killed = 0
    while killed < kills:
        for path in out.rglob("*"):
            if path.is_file() and draw.random() < 0.7:  # begin with a folder that lacks something
                path.unlink()
        for _ in range(3):
            process = start(folder)
            time.sleep(draw.uniform(0.2, 0.9) * usual)
            killed += kill_group(process)
        before = samples_on_disk(out)
        report = finish(folder)
        assert tars(out) == undisturbed, f"after {killed} kills (seed {seed})"
        assert report["encoded"] == 5 - before, "a sample was encoded again that was whole on the disk"
        assert verify(out).problems == []


def test_ten_random_kills(encoded):
    kill_at_random(encoded, tars(encoded / "out"), kills=10, seed=7)


@pytest.mark.full
def test_two_hundred_random_kills(encoded):
    kill_at_random(encoded, tars(encoded / "out"), kills=200, seed=11)


def test_interrupted_it_says_how_to_go_on(encoded):
    process, out = start(encoded), encoded / "new"
    while process.poll() is None and not list(out.glob(".*.tar.tmp")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and b"run the same command again" in said and b"Traceback" not in said
    finish(encoded)
    assert tars(out) == tars(encoded / "out")


def test_workers_one_of_them_killed_and_another_division_finishes(encoded):
    undisturbed, out = tars(encoded / "out"), encoded / "new"
    workers = [start(encoded, "--worker", f"{index}/3") for index in (1, 2)]
    twin = start(encoded, "--worker", "1/3")  # by mistake
    while not list(out.glob("00000[01].parquet")) and any(worker.poll() is None for worker in workers):
        time.sleep(0.05)
    kill_group(workers[1])
    for worker in (workers[0], twin):
        assert worker.wait(timeout=300) == 0, worker.stderr.read()
        worker.stderr.close()
    assert not (out / "000002.tar").exists()
    reports = [json.loads((out / "report-1-of-3.json").read_text())]
    assert "000002.tar" in reports[0]["unfinished"] and "3/3" in reports[0]["unfinished_slices"]
    before = samples_on_disk(out)
    encoded_again = sum(finish(encoded, "--worker", f"{index}/2")["encoded"] for index in (2, 1))
    assert encoded_again == 5 - before
    assert tars(out) == undisturbed
    assert verify(out).problems == []


def test_a_full_disk_is_one_message_and_what_was_committed_stays(encoded):
    def at_most_400_kb() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    command = [*command_line(encoded)[:-4], "--shard-samples", "5", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=at_most_400_kb)
    assert done.returncode == 2 and "no more room" in done.stderr and "Traceback" not in done.stderr
    assert not list((encoded / "new").glob("*.tar"))
    before = samples_on_disk(encoded / "new")
    assert before >= 2
    report = finish(encoded, "--shard-samples", "5")
    assert (report["encoded"], report["recovered"]) == (5 - before, before)
    assert verify(encoded / "new").problems == []
