"""A transformer with adapters that matter, as training would leave it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.device import pick_device
from cogtrain.model import lora

pick_device()
RANK, ALPHA = 4, 1.0  # alpha/rank = 0.25: lost, the adapter acts four times too strongly


@pytest.fixture
def live_model() -> Callable:
    """live_model(name, **attach options) -> checkpoint, transformer with a LoRA whose B is not zero."""

    def make(name="random-tiny", **options):
        checkpoint = open_checkpoint(name)
        transformer = checkpoint.load_transformer(torch.float32)
        lora.attach(transformer, **({"rank": RANK, "alpha": ALPHA} | options))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in sorted(transformer.named_parameters()):
                if parameter.requires_grad and (parameter == 0).all():
                    parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))
        return checkpoint, transformer

    return make


@pytest.fixture(scope="session")
def train_here() -> Callable:
    """train_here(settings, **options of `train`) -> run folder; the whole run, in this process."""
    from accelerate.state import AcceleratorState

    from cogtrain.distributed.signals import StopRequest
    from cogtrain.runs.run import open_run
    from cogtrain.trainer.trainer import train

    def run(settings, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        return train(open_run(settings, torch.device("cpu"), 1), StopRequest(), **options)

    return run


@pytest.fixture
def losses() -> Callable:
    """losses(run folder) -> {step: loss}."""

    def read(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    return read


@pytest.fixture(scope="session")
def run_ranks() -> Callable:
    """run_ranks(world, cases, folder, environment) -> {case name: [what each rank saw]}; see worker.py."""

    def run(world, cases, folder, environment=os.environ, timeout=600):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cases.json").write_text(json.dumps(cases, default=str))
        worker = Path(__file__).with_name("worker.py")
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
             str(worker), str(folder / "cases.json"), str(folder)],
            capture_output=True, text=True, timeout=timeout, env={**environment, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return {
            case["name"]: [json.loads((folder / f"{case['name']}-{rank}.json").read_text()) for rank in range(world)]
            for case in cases
        }

    return run
