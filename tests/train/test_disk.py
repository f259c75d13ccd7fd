"""A disk that is full at each write of a run, and then has room: the undisturbed run's losses and weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from disk_full import SOURCE

SETTINGS = {"steps": 3, "rank": 2, "lr": 1e-2, "save_every": 1, "keep": 2, "seed": 3}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The layer in front of libc."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to compile the layer in front of libc with")
    folder = tmp_path_factory.mktemp("library")
    (folder / "full.c").write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "full.so", "full.c", "-ldl"], cwd=folder, check=True)
    return folder / "full.so"


@pytest.fixture(scope="module")
def run_full(library, make_shards, tmp_path_factory):
    """run_full(writes, **settings) -> what happened with each of them, in one child."""
    shards = tmp_path_factory.mktemp("shards")
    make_shards(shards, samples=4)

    def run(at, **settings):
        out = tmp_path_factory.mktemp("disk")
        case = {"out": out, "shards": [str(shards)], "at": [*at], "settings": SETTINGS | settings}
        (out / "case.json").write_text(json.dumps(case, default=str))
        child = Path(__file__).with_name("disk_full.py")
        done = subprocess.run(
            [sys.executable, str(child), str(out / "case.json")],
            capture_output=True, text=True, timeout=3000, env=os.environ | {"LD_PRELOAD": str(library)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run


def check(whole, found):
    for seen in found:
        assert "the disk is full" in seen["said"], seen
        assert "cogtrain lora --config" in seen["said"] or "run the command again" in seen["said"], seen
        assert seen["left"] == [], seen  # the room that a half-written thing takes is given back
        if seen["kept"]:
            assert f"goes on from {seen['kept'][-1]}" in seen["said"], seen
        assert seen["losses"] == whole["losses"] and seen["weights"] == whole["weights"] and seen["report"], seen


def test_full_at_some_writes_then_room_is_the_undisturbed_run(run_full):
    (whole,) = run_full([-1])
    assert whole["said"] == "" and whole["writes"] > 30
    check(whole, run_full([1, whole["writes"] // 3, 2 * whole["writes"] // 3]))


@pytest.mark.full
@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "tracker": "tensorboard"}], ids=["plain", "ema"])
def test_full_at_every_write_then_room_is_the_undisturbed_run(run_full, settings):
    (whole,) = run_full([-1], **settings)
    found = run_full(range(1, whole["writes"] + 1), **settings)
    told = [seen for seen in found if seen["said"]]
    check(whole, told)
    for seen in found:
        assert seen["losses"] == whole["losses"] and seen["weights"] == whole["weights"], seen
