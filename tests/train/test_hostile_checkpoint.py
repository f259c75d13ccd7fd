"""A checkpoint whose files ask for more than numbers: nothing of it is run, whoever reads it."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from cogcommon.errors import RunError
from cogtrain.distributed import zero
from cogtrain.distributed.strategy import read_weights


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def cogtrain(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "cogtrain", "lora", "--shards", "out", "--out", "run", "--rank", "2", "--strategy",
         "zero2", *words],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_shards):
    """One step by one process, which takes two samples."""
    folder = tmp_path_factory.mktemp("hostile")
    make_shards(folder / "out", samples=4)
    done = cogtrain(folder, "--steps", "1", "--nproc", "1", "--accumulate", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def states(checkpoint):
    return sorted((checkpoint / "state").glob("*.pt"))


@pytest.fixture(params=["model_states", "optim_states"])
def hostile(place, tmp_path, request):
    """A folder with the run in it, and the file that is there once the payload has run."""
    folder = tmp_path / "copy"
    shutil.copytree(place, folder)
    proof = tmp_path / "executed"
    (file,) = [path for path in states(folder / "run" / "checkpoint-1") if request.param in path.name]
    with torch.serialization.safe_globals([]):
        state = torch.load(file, weights_only=False)  # our own, from a moment ago
    torch.save(state | {"more": Payload(proof)}, file)
    torch.load(file, weights_only=False)
    assert proof.exists()  # it would
    proof.unlink()
    return folder, proof


@pytest.mark.parametrize(
    "words",
    [("--nproc", "1", "--accumulate", "2"), pytest.param(("--nproc", "2"), marks=pytest.mark.full)],
    ids=["same", "converted"],
)
def test_resume(hostile, words):
    folder, proof = hostile
    done = cogtrain(folder, "--steps", "2", *words)
    assert not proof.exists()
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-3000:]
    assert "asks for more than numbers" in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]


def test_conversion_and_export(hostile, tmp_path):
    folder, proof = hostile
    checkpoint = folder / "run" / "checkpoint-1"
    with pytest.raises(RunError, match="asks for more than numbers"):
        read_weights(checkpoint)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        zero.convert(checkpoint, tmp_path / "universal")
    assert not proof.exists()
