"""A run on CPUs in a memory group: it takes what `cogtrain plan` says, and without that it does not begin."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogcommon.model.families import Resolution

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
