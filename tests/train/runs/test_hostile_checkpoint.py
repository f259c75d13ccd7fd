"""A checkpoint whose files ask for more than numbers: nothing of it is run, whoever reads it."""

import shutil

import pytest
import torch
from forked import Forked

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
    same = ["--shards", "out", "--out", "run", "--rank", "2", "--strategy", "zero2"]
    return Forked(["cogtrain", "lora", *same, *words], folder, {"DS_ACCELERATOR": "cpu"}).end()


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_shards):
    """One step by one process, which takes two samples."""
    folder = tmp_path_factory.mktemp("hostile")
    make_shards(folder / "out", samples=4)
    code, _, err = cogtrain(folder, "--steps", "1", "--nproc", "1", "--accumulate", "2")
    assert code == 0, err[-3000:]
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
    code, out, err = cogtrain(folder, "--steps", "2", *words)
    assert not proof.exists()
    assert code == 2, out[-2000:] + err[-3000:]
    assert "asks for more than numbers" in err and "Traceback" not in err, err[-3000:]


def test_conversion_and_export(hostile, tmp_path):
    folder, proof = hostile
    checkpoint = folder / "run" / "checkpoint-1"
    with pytest.raises(RunError, match="asks for more than numbers"):
        read_weights(checkpoint)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        zero.convert(checkpoint, tmp_path / "universal")
    assert not proof.exists()
