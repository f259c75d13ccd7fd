"""What DeepSpeed is said to hold, against every tensor that lives in two processes while it trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogtrain.step.demand import bytes_a_weight, bytes_apart, host_bytes_a_weight

WORLD = 2
STRATEGIES = ["zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]


@pytest.mark.full  # half a minute
def test_what_zero_holds_is_what_is_computed(tmp_path):
    worker = Path(__file__).with_name("live_bytes.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), str(worker),
         ",".join(STRATEGIES), str(tmp_path)],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for strategy in STRATEGIES:
        found = json.loads((tmp_path / f"{strategy}.json").read_text())
        weights = found["weights"]
        # On a CPU what is offloaded lies beside what is not.
        held = bytes_a_weight(strategy, WORLD) + host_bytes_a_weight(strategy) / WORLD
        # Beside it there are two buffers of the largest weight, a twelfth of all here, and a bucket.
        assert found["held"] / weights == pytest.approx(held, abs=0.4), strategy
        assert found["held"] / weights > held, strategy
        if not strategy.endswith("-offload"):
            step = bytes_apart(weights, strategy, WORLD) / weights
            assert found["step"] / weights == pytest.approx(step, abs=0.2), strategy


@pytest.mark.full  # half a minute
def test_our_blocks_under_zero3_hold_no_weights_between_the_passes(tmp_path):
    """DeepSpeed lends a block its weights for as long as it computes; a view that autograd kept would keep them all."""
    script = Path(__file__).with_name("lent_weights.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
         str(tmp_path)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "held.json").read_text())
    assert len(found) == 4
    for plan, share in found.items():
        assert share["between"] == 0 and 0.1 < share["most"] < 0.5, (plan, share)
