"""generate and export on a disk that takes no more: one message, and nothing half-written under its final name."""

import json
import resource
import signal
from contextlib import contextmanager

import av
import pytest
import safetensors.torch

from cogcommon.errors import DiskError
from cogtrain.commands import export, generate
from cogtrain.model import lora
from cogtrain.settings.results import ExportSettings, GenerateSettings
from cogtrain.settings.training import LoraSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_shards, train_here):
    folder = tmp_path_factory.mktemp("run")
    make_shards(folder / "shards", samples=2)
    return train_here(LoraSettings(shards=[str(folder / "shards")], out=folder / "run", steps=1, rank=8))


@contextmanager
def files_of_at_most(size):
    """Writes beyond it fail, as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def refused(command, settings, size):
    with pytest.raises(DiskError, match="larger than files may be there") as caught, files_of_at_most(size):
        command(settings)
    assert "run the command again" in str(caught.value)


@pytest.mark.parametrize(("to", "size"), [("diffusers", 50_000), ("peft", 50_000), ("merged", 1_000_000)])
def test_export(run, tmp_path, capsys, to, size):
    settings = ExportSettings(run=run, to=to, out=tmp_path / "out", json=True)
    refused(export.run, settings, size)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left <= {".cogtune.json"}, left
    export.run(settings)
    assert json.loads(capsys.readouterr().out)["difference"] < 1e-5


@pytest.mark.parametrize("size", [1500, *(pytest.param(size, marks=pytest.mark.full) for size in (100, 4000, 8000))])
def test_generate(run, tmp_path, capsys, size):
    settings = GenerateSettings(
        run=run, prompt=["a ball"], steps=1, resolution="9x64x96", base=False, out=tmp_path / "out", json=True
    )
    refused(generate.run, settings, size)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left <= {".cogtune.json", "tuned.mp4"}, left
    if "tuned.mp4" in left:
        assert frames(tmp_path / "out" / "tuned.mp4") == 9
    generate.run(settings)
    assert frames(tmp_path / "out" / "tuned.mp4") == 9


def frames(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_weights_have_the_permissions_of_other_new_files(run, tmp_path, capsys):
    """safetensors makes its files for their owner alone."""
    (tmp_path / "another").write_text("")
    usual = (tmp_path / "another").stat().st_mode
    export.run(ExportSettings(run=run, to="merged", out=tmp_path / "out"))
    written = [*(tmp_path / "out").rglob("*.safetensors"), *run.rglob("*.safetensors"), *run.glob("checkpoint-1/*")]
    assert len(written) >= 5
    assert {path.name: path.stat().st_mode for path in written} == {path.name: usual for path in written}
    safetensors.torch.load_file(run / lora.FILE)
