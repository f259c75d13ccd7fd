"""A transformer with adapters that matter, as training would leave it."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import ForkedRanks
from places import CHILDREN, CHILDREN_PATH

from cogcommon.model.device import pick_device

pick_device()


@pytest.fixture(scope="session")
def train_here() -> Callable:
    """train_here(settings, **options of `train`) -> run folder; the whole run, in this process."""
    from accelerate.state import AcceleratorState

    from cogtrain.distributed.signals import StopRequest
    from cogtrain.runs.opening import open_run
    from cogtrain.trainer.trainer import train

    def run(settings, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        return train(open_run(settings, torch.device("cpu"), 1), StopRequest(), **options)

    return run


@pytest.fixture(scope="session")
def losses() -> Callable:
    """losses(run folder) -> {step: loss}, of a run that makes no step now."""

    def read(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        assert len(dict(steps)) == len(steps), "a step stands twice"
        return dict(steps)

    return read


@pytest.fixture(scope="session")
def run_ranks() -> Callable:
    """run_ranks(world, cases, folder) -> {case name: [what each rank saw]}; see worker.py.

    With an ``environment``, in processes that torchrun starts in it; without, in forked ones, which is sooner.
    """

    def run(world, cases, folder, environment=None, timeout=600):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cases.json").write_text(json.dumps(cases, default=str))
        words = [str(CHILDREN / "worker.py"), str(folder / "cases.json"), str(folder)]
        if environment is None:
            ended = ForkedRanks(world, words, folder).end(timeout)
            assert all(code == 0 for code, *_ in ended), "\n".join(out[-4000:] + err[-8000:] for _, out, err in ended)
        else:
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *words],
                capture_output=True, text=True, timeout=timeout,
                env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": CHILDREN_PATH},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return {
            case["name"]: [json.loads((folder / f"{case['name']}-{rank}.json").read_text()) for rank in range(world)]
            for case in cases
        }

    return run


def write_step(step, **changes):
    """A line of metrics.jsonl."""
    line = {
        "step": step, "epoch": 0, "loss": 1 / step, "lr": 1e-4, "grad_norm": 1.0, "s_per_step": 2.0,
        "samples_per_s": 2.0, "peak_gib": 3.25,
    }  # fmt: skip
    return json.dumps(line | changes) + "\n"


@pytest.fixture
def step_line() -> Callable:
    """step_line(step, **changes) -> a line of metrics.jsonl."""
    return write_step


@pytest.fixture
def make_recorded_run(tmp_path) -> Callable:
    """make_recorded_run(name, **settings) -> the folder of a run that nobody makes: 38 of 40 steps, one video."""
    from cogtrain.runs.folder import RunFacts

    facts = RunFacts(
        model="tiny", revision=None, family="5b", task="t2v", method="lora", contract_fingerprint="c" * 64,
        shards_fingerprint="f" * 64, shards=2, samples={"17x64x96": 30}, held_out=4, steps=40, processes=2,
        global_batch=4, strategy="zero2", precision="bf16", device="CPU", trainable=1234567, version="0.1.0",
    )  # fmt: skip

    def make(name, **settings):
        folder = tmp_path / name
        (folder / "validation/step-000020").mkdir(parents=True)
        (folder / "validation/step-000020/0.mp4").write_bytes(bytes(range(100)))
        (folder / "validation/captions.json").write_text(json.dumps(["a <cat>", "never drawn"]))
        facts.write(folder)
        settings = {"model": "tiny", "lr": 1e-4} | settings
        (folder / "config.toml").write_text(
            "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        )
        lines = [write_step(step) for step in range(1, 39)]
        lines.insert(20, json.dumps({"step": 20, "val_loss": 0.15, "base_val_loss": 0.2}) + "\n")
        (folder / "metrics.jsonl").write_text("".join(lines))
        return folder

    return make


@pytest.fixture
def recorded_run(make_recorded_run) -> Path:
    return make_recorded_run("run")


@pytest.fixture
def served() -> Callable:
    """with served(*runs) as port: ``cogtrain watch`` in a thread."""

    @contextmanager
    def serving(*runs):
        server = serve(list(runs), 0)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    from cogtrain.commands.watch import serve

    return serving
