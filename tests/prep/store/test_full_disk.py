"""`index` on a disk that takes no more: one message, nothing half-written, then the same. `verify` needs no room."""

import json
import shutil
import subprocess
import sys

import pytest
from places import CHILDREN

from cogprep.commands.index import index

DRIVER = CHILDREN / "full_disk_driver.py"


@pytest.mark.full
def test_index_at_every_write_and_verify_after_all(full_disk, encoded, tmp_path):
    lost, whole = encoded / "out", tmp_path / "whole"
    for name in ("000000.parquet", "000002.parquet", "contract.json"):
        (lost / name).unlink()
    shutil.copytree(lost, whole)
    index(whole)
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(lost), str(tmp_path / "work")],
        capture_output=True, text=True, timeout=300, env=full_disk(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *found, last, again = map(json.loads, done.stdout.splitlines())
    assert len(found) > 10 and last["said"] == "" and not last["refused"]
    shards = {"000000.tar", "000001.tar", "000002.tar", "000001.parquet"}
    for seen in found:
        assert "the disk is full" in seen["said"] and "run the command again" in seen["said"], seen
        # What it had put back by then, and nothing half-written.
        half = [name for name in seen["left"] if name.endswith((".tmp", ".new"))]
        assert not half and shards <= {*seen["left"]}, seen
        assert (seen["files"], seen["rows"]) == (last["files"], last["rows"]), seen
    assert last["files"] == sorted(path.name for path in whole.iterdir())
    assert again == [0.0]
