"""A run on CPUs in a memory group: it takes what `cogtrain plan` says, and without that it does not begin."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import Resolution
from cogtrain.memory.estimate import estimate
from cogtrain.model.lora_file import FILE, read_facts
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings

pytestmark = pytest.mark.full  # a minute for each batch; and groups are root's

GROUPS = Path("/sys/fs/cgroup/memory")
MARGIN = 0.2  # of what is said, by which a run may take less; it may not take more
NATIVE, SHORT = Resolution(49, 480, 720), Resolution(9, 480, 720)  # latents of 4 MiB, and of less than one


@pytest.fixture
def in_group():
    """in_group(limit, words) -> exit code, what was said on stderr, bytes held at most; but for the file cache."""
    group = GROUPS / f"cogtune-promise-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory group can be made here: {error.strerror}")

    def run(limit, words):
        (group / "memory.limit_in_bytes").write_text(str(limit))
        join = f"import os, sys; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
        running = subprocess.Popen(
            [sys.executable, "-c", join + "os.execv(sys.executable, [sys.executable, '-m', 'cogtrain', *sys.argv[1:]])",
             *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        most = 0
        while running.poll() is None:
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            most = max(most, int(stat["total_rss"]))
            time.sleep(0.005)
        return running.returncode, running.stderr.read(), most

    yield run
    group.rmdir()


@pytest.fixture
def shards_of(tmp_path, make_shards):
    """shards_of(size, samples) -> folder."""

    def make(size, samples):
        make_shards(tmp_path / "shards", "random-tiny", resolutions=(size,), samples=samples, per_shard=8)
        return tmp_path / "shards"

    return make


def said_by_plan(shards, batch):
    done = subprocess.run(
        [sys.executable, "-m", "cogtrain", "plan", "--shards", str(shards), "--gpu", "none", "--method", "lora",
         "--batch-size", str(batch), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = [line for line in json.loads(done.stdout) if (line["strategy"], line["memory"]) == ("ddp", "auto")]
    return int(line["host_total_gib"] * 2**30)


@pytest.mark.parametrize(("size", "batch"), [(NATIVE, 1), (NATIVE, 2), (SHORT, 32)], ids=str)
def test_a_run_takes_what_the_plan_says(in_group, shards_of, tmp_path, size, batch):
    shards = shards_of(size, max(16, batch))
    said = said_by_plan(shards, batch)
    words = [
        "lora",
        "--shards",
        str(shards),
        "--batch-size",
        str(batch),
        "--steps",
        "6",  # more than the loader makes ahead
        "--out",
        str(tmp_path / "run"),
    ]
    code, error, most = in_group(int(1.02 * said), words)  # the plan says two digits
    print(f"{size}, batch {batch}: the plan says {said >> 20} MiB, the run held {most >> 20}")
    assert code == 0, error
    assert (1 - MARGIN) * said <= most <= 1.02 * said


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_run_whose_end_takes_most_takes_what_is_computed(in_group, tmp_path, make_shards, keep_best):
    """Of a model of 0.5 GiB on few tokens, whose second base is what a kept checkpoint adds.

    Its file is in half precision: weights in the type that is computed in would stay in the file cache.
    """
    model = tmp_path / "model"
    shutil.copytree(open_checkpoint("random-tiny").root, model)
    config = open_checkpoint(str(model)).transformer_config
    wide = CogVideoXTransformer3DModel.from_config(
        dict(config) | {"num_attention_heads": 24, "attention_head_dim": 64, "num_layers": 4}
    )
    wide.half().save_pretrained(model / "transformer")
    make_shards(tmp_path / "shards", str(model), samples=4)
    make_shards(tmp_path / "held", str(model), samples=1, seed=9)
    settings = LoraSettings(
        shards=[str(tmp_path / "shards")], validate_shards=[str(tmp_path / "held")], validate_every=1, steps=3,
        lr=0.09, warmup=0, keep_best=keep_best, out=tmp_path / "run",  # a rate at which the first step is the best
    )  # fmt: skip
    words = [
        "lora", "--shards", str(tmp_path / "shards"), "--validate-shards", str(tmp_path / "held"), "--validate-every",
        "1", "--steps", "3", "--lr", "0.09", "--warmup", "0", "--out", str(tmp_path / "run"),
        *["--keep-best"] * keep_best,
    ]  # fmt: skip
    said = estimate(open_run(settings, torch.device("cpu"), 1), gpu=False).host_at_most(1)
    code, error, most = in_group(int(1.02 * said), words)
    print(f"keep best {keep_best}: computed {said >> 20} MiB, the run held {most >> 20}")
    assert code == 0, error
    assert (read_facts(tmp_path / "run" / FILE)["steps"] != "3") == keep_best
    assert (1 - MARGIN) * said <= most <= 1.02 * said


def test_a_run_that_would_be_killed_is_refused_before_it_begins(in_group, shards_of, tmp_path):
    shards = shards_of(NATIVE, 8)
    begun = time.monotonic()
    code, error, most = in_group(
        1300 << 20,
        ["lora", "--shards", str(shards), "--batch-size", "8", "--memory", "fast", "--out", str(tmp_path / "run")],
    )
    assert code == 2 and time.monotonic() - begun < 60, error
    assert "of host memory" in error and str(GROUPS) in error and "--batch-size" in error
    assert most < 600 << 20
