"""clean-cache, encode, index, verify and preview at once on a folder: nothing that was committed is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import CHILDREN, CHILDREN_PATH

DRIVER = CHILDREN / "interleave_driver.py"


def interleaved(folder: Path, tmp_path: Path, every: int) -> dict:
    words = [sys.executable, str(DRIVER), str(tmp_path), str(folder / "out" / "contract.json"), str(every), "0"]
    environment = os.environ | {"PYTHONPATH": CHILDREN_PATH}
    done = subprocess.run(words, capture_output=True, text=True, timeout=3600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == [], done.stderr[-3000:]
    return result


def test_some_stops(encoded_once, tmp_path):
    assert interleaved(encoded_once, tmp_path, every=16)["runs"] >= 30


@pytest.mark.full
def test_every_stop(encoded_once, tmp_path):
    runs = interleaved(encoded_once, tmp_path, every=1)["runs"]
    print(runs)
    assert runs >= 500
