"""The three lines of the design, typed into a shell in one folder, with the globs unquoted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Forked

from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.runs.folder import read_run
from workshop.draw import write_data_set


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main path")  # a space in its name
    write_data_set(folder / "ds", 6, seed=3)
    (folder / "ds" / "videos" / "004.mp4").write_bytes(b"not a video")
    encode = "cogprep encode --data-root ds/ --resolution 17x64x96 --model tiny --shard-samples 2 --holdout 1"
    done = shell(encode, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run_folder(folder):
    done = shell(
        "cogtrain lora --shards out/*.tar --steps 2 --validate-shards out/val/*.tar --validate-every 1", folder
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    assert f"cogtrain generate --run runs/{run.name}" in done.stdout
    return run


def test_a_broken_clip_is_named_and_the_rest_is_encoded(folder):
    report = json.loads((folder / "out" / "report.json").read_text())
    assert (report["encoded"], report["reused"], report["rejected"]) == (5, 0, 1)
    (rejection,) = report["rejections"]
    assert (rejection["line"], rejection["source"]) == (5, "videos/004.mp4") and rejection["reason"]
    assert len(list((folder / "out").glob("*.tar"))) == len(list((folder / "out").glob("*.parquet"))) == 2


def test_training_never_sees_a_held_out_sample(folder, run_folder):
    run = read_run(run_folder)
    assert [line.step for line in run.steps] == [1, 2]
    assert len(run.validations) == 2 and all(line.val_loss > 0 and line.base_val_loss > 0 for line in run.validations)
    # A training set that holds only the held-out clip has nothing left to train on.
    words = "cogtrain lora --shards out/val/*.tar --steps 1 --validate-shards out/val/*.tar"
    code, _, err = Forked(words.split(), folder).end()
    assert code == 2 and "none is left to train on" in err


def test_the_exported_file_loads_into_the_pipeline_and_changes_its_answer(run_folder):
    from diffusers import CogVideoXPipeline

    checkpoint = open_checkpoint("tiny")
    pipeline = CogVideoXPipeline.from_pretrained(checkpoint.root)
    inputs = {
        "hidden_states": torch.randn(1, 5, 16, 8, 12, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.randn(1, 226, 64, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([500]),
    }
    with torch.no_grad():
        before = pipeline.transformer(**inputs).sample
        pipeline.load_lora_weights(run_folder, weight_name="pytorch_lora_weights.safetensors")
        after = pipeline.transformer(**inputs).sample
    assert (after - before).abs().max() > 1e-7


def test_a_second_encode_reuses_and_clean_cache_spares_the_data(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder / "ds").rglob("*")}
    tars = {path.name: path.read_bytes() for path in (folder / "out").glob("*.tar")}
    encode = "cogprep encode --data-root ds/ --resolution 17x64x96 --model tiny --shard-samples 2 --holdout 1"
    code, _, err = Forked(encode.split(), folder).end()
    assert code == 0, err
    report = json.loads((folder / "out" / "report.json").read_text())
    assert (report["encoded"], report["reused"]) == (0, 5)
    assert {path.name: path.read_bytes() for path in (folder / "out").glob("*.tar")} == tars
    cleaned = shell("cogprep clean-cache", folder)
    assert cleaned.returncode == 0, cleaned.stderr
    assert len(list((folder / "out").glob("*.tar"))) == 2
    asked = shell("cogprep clean-cache --all < /dev/null", folder)
    assert asked.returncode == 2, "no terminal and no --yes"
    assert Forked(["cogprep", "clean-cache", "--all", "--yes"], folder).end()[0] == 0
    assert not list((folder / "out").glob("**/*.tar"))
    assert {path: path.stat().st_mtime_ns for path in (folder / "ds").rglob("*")} == before
