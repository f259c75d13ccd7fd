"""What planning costs for a clip does not grow with the number of clips: no step is quadratic, in time or in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import CHILDREN, CHILDREN_PATH

from cogprep.plan import origin as origins
from cogprep.plan.origin import Origin
from workshop.million import STAGES, main

FEW, MANY = 2_000, 8_000


@pytest.fixture(scope="module")
def costs(tmp_path_factory) -> dict:
    """What plan_costs.py says: see there."""
    done = subprocess.run(
        [sys.executable, str(CHILDREN / "costs/plan_costs.py"), tmp_path_factory.mktemp("costs"), str(FEW), str(MANY)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": CHILDREN_PATH},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_four_times_the_clips_take_four_times_as_long(costs):
    for stage, (few, many) in costs["cpu_s"].items():
        assert many < 8 * few, f"{stage}: {few:.2f} s of {FEW} clips, {many:.2f} s of {MANY}; 16 times were quadratic"


def test_a_clip_takes_no_more_than_so_much_memory(costs):
    few, many = costs["peak_bytes"]
    assert few / FEW < 4_000, "bytes a clip, captions of 300 among them"
    assert (many - few) / (MANY - FEW) < 1_000, "bytes of each further clip"


def test_the_lists_are_read_once_however_many_samples_go(tmp_path, monkeypatch):
    """Before a sample goes, the lists are looked at again: of a million, 400 MB each time."""
    lists = {name: tmp_path / name for name in ("prompts.txt", "videos.txt")}
    for path in lists.values():
        path.write_text("one\n")
    origin = Origin(str(tmp_path), "prompts.txt", "videos.txt", None, "")
    just_written = origin.state_of_lists()
    reads: list[Path] = []
    hash_of_list = origins.hash_of_list
    monkeypatch.setattr(origins, "hash_of_list", lambda path: (reads.append(path), hash_of_list(path))[1])
    monkeypatch.setattr(origins, "_SETTLED_NS", -(1 << 62))
    assert {origin.state_of_lists() for _ in range(100)} == {just_written} and len(reads) <= 2
    lists["prompts.txt"].write_text("two\n")
    os.utime(lists["prompts.txt"], ns=(1, 1))  # within a tick of the file system's clock it would have the same time
    assert origin.state_of_lists() != just_written
    monkeypatch.setattr(origins, "_SETTLED_NS", 1 << 62)  # of a list written just now, time and size say little
    reads.clear()
    assert origin.state_of_lists() == origin.state_of_lists() and len(reads) == 4


@pytest.mark.full
def test_a_million(tmp_path):
    """About 15 minutes on two cores, a million inodes and 1 GB of disk."""
    main(tmp_path / "million", 1_000_000, 50)
    results = {row["stage"]: row for row in map(json.loads, (tmp_path / "million/results.jsonl").open())}
    assert results.keys() == STAGES.keys()
    for stage in ("plan, from the survey cache", "plan, half committed", "plan, all committed", "plan, 2% changed"):
        assert results[stage]["cpu_s"] < 120 and results[stage]["peak_mib"] < 3 << 10, results[stage]
    assert results["train"]["cpu_s"] < 120 and results["train"]["peak_mib"] < 3 << 10, results["train"]
