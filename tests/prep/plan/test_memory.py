"""Memory: the pipeline holds a window of clips, never the data set; the plan holds a small row a sample."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import CHILDREN, CHILDREN_PATH

MEASURE = """
import sys, tracemalloc
from pathlib import Path
import crash_driver as driver
from cogcommon.shards.contract import Contract
from cogprep.dataset.lists import Sample
from cogprep.plan import plan
from cogprep.plan.folder import Committed
from cogprep.source.clip import Hashed

what, count, folder, contract_file = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
contract = Contract.from_json(Path(contract_file).read_bytes(), where="test")
if what == "encode":
    folder.mkdir()
    driver.CLIPS["many"] = [f"clip{index}" for index in range(count)]
    driver.bring_up_to_date(folder, contract, driver.CLIPS["many"])
    # What getrusage says of a process that was begun by a larger one is that one's.
    print(next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
else:
    tracemalloc.start()
    candidates = [
        plan.Candidate(Sample(n, f"a caption of usual length, number {n} " * 4, f"videos/{n:06d}.mp4", ""),
                       Hashed(1, n, n.to_bytes(32, "big")), b"")
        for n in range(count)
    ]
    keys = plan.with_keys(candidates, contract)
    empty = Committed({"train": {}, "val": {}}, {})
    splits = ["val" if n < 100 else "train" for n in range(count)]
    made = plan.make_plan(candidates, keys, splits, dict.fromkeys(keys, driver.BUCKET), empty,
                          bucket_order=[driver.BUCKET], chunk={driver.BUCKET: 200})
    assert made.new == count
    print(tracemalloc.get_traced_memory()[1])
"""


def measure(what: str, count: int, tmp_path: Path, contract: Path) -> int:
    """Peak bytes of encoding (of the process) or planning (of Python objects) ``count`` samples."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, what, str(count), str(tmp_path / f"{what}{count}"), str(contract)],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((CHILDREN_PATH, str(CHILDREN)))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def contract(make_shards, tmp_path) -> Path:
    make_shards(tmp_path / "any", samples=1)
    return tmp_path / "any" / "contract.json"


def test_encoding_is_flat_in_the_number_of_samples(tmp_path, contract):
    few, many = (measure("encode", count, tmp_path, contract) for count in (20, 400))
    per_sample = (many - few) / 380
    # A sample's tensors are 59 KB here; holding on to them would show as that, a plan row as 1 KB.
    assert per_sample < 15_000, f"{per_sample:.0f} bytes a sample"


def test_planning_takes_less_than_a_kilobyte_a_sample(tmp_path, contract):
    few, many = (measure("plan", count, tmp_path, contract) for count in (100, 20_100))
    assert (many - few) / 20_000 < 1_000, f"{(many - few) / 20_000:.0f} bytes a sample"


@pytest.mark.full
def test_planning_a_hundred_thousand_samples(tmp_path, contract):
    few, many = (measure("plan", count, tmp_path, contract) for count in (100, 100_100))
    print(f"{(many - few) / 100_000:.0f} bytes a sample")
    assert (many - few) / 100_000 < 1_000
