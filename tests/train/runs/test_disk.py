"""A disk that is full at each write of a run, and then has room: the undisturbed run's losses and weights."""

import json
import subprocess
import sys

import pytest
from places import CHILDREN

from cogtrain.runs.checkpoint import list_checkpoints

SETTINGS = {"steps": 3, "rank": 2, "lr": 1e-2, "save_every": 1, "keep": 2, "seed": 3}
WHOLE = ("*", -1)


@pytest.fixture(scope="module")
def run_full(full_disk, make_shards, tmp_path_factory):
    """run_full(at, **settings) -> what happened with each fault, in one child; see disk_full.py."""
    shards = tmp_path_factory.mktemp("shards")
    make_shards(shards, samples=4)

    def run(at, **settings):
        out = tmp_path_factory.mktemp("disk")
        case = {"out": out, "shards": [str(shards)], "at": [*at], "settings": SETTINGS | settings}
        (out / "case.json").write_text(json.dumps(case, default=str))
        child = CHILDREN / "disk_full.py"
        done = subprocess.run(
            [sys.executable, str(child), str(out / "case.json")],
            capture_output=True, text=True, timeout=3000, env=full_disk(),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert "Traceback" not in done.stderr
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


def test_full_at_a_write_then_room_is_the_undisturbed_run(run_full):
    """In the middle of all, and where the tracker writes, which does so in a thread of its own."""
    whole, *found = run_full([WHOLE, ("*", 0.6), ("*/tensorboard/*", 3)], tracker="tensorboard")
    assert whole["said"] == "" and whole["writes"] > 30
    check(whole, found)


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=pytest.mark.full) for name in ("zero3", "ddp", "zero2", "zero3-offload")]
)
def test_one_of_two_processes_cannot_write_its_part(full_disk, tmp_path, make_shards, run_ranks, losses, strategy):
    make_shards(tmp_path / "shards", samples=8)
    part = "optimizer.pt" if strategy == "ddp" else "*rank_1*optim_states.pt"  # with DDP the first writes all
    cases = [
        {"name": "whole"},
        {"name": "refused", "out": "run", "full": f"*.checkpoint-2.*{part}", "refused": True},
        {"name": "resumed", "out": "run", "full": ""},
    ]
    for case in cases:
        case["method"] = "sft"
        case["settings"] = {name: SETTINGS[name] for name in SETTINGS if name != "rank"}
        case["settings"] |= {"shards": [str(tmp_path / "shards")], "strategy": strategy}
        case["settings"]["out"] = tmp_path / case.get("out", case["name"])
    seen = run_ranks(2, cases, tmp_path / "ranks", full_disk())
    (kind, said, _), (other, *_) = (rank["error"] for rank in seen["refused"])
    assert kind in ("DiskError", "RunError") and other == "PeerFailed"  # said once
    assert "the disk is full" in said and "goes on from checkpoint-1, which is whole" in said
    step = 3 if strategy == "ddp" else 2  # it is written beside the next step
    assert f"the weights after step {step} are in" in said
    assert (tmp_path / "run" / f"step-{step}" / "transformer").is_dir()
    if strategy != "ddp":
        assert "rank_1" in said and "process 1 of 2" in said
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.full
@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "tracker": "tensorboard"}], ids=["plain", "ema"])
def test_full_at_every_write_then_room_is_the_undisturbed_run(run_full, settings):
    (whole,) = run_full([WHOLE], **settings)
    found = run_full([("*", n) for n in range(1, whole["writes"] + 1)], **settings)
    check(whole, [seen for seen in found if seen["said"]])
    for seen in found:
        assert seen["losses"] == whole["losses"] and seen["weights"] == whole["weights"], seen
