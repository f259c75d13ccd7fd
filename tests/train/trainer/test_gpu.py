"""Whole runs of one GPU process, small ones: every strategy trains, saves, goes on and exports there, too."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import pick_device
from cogcommon.model.text_encoder import TextEncoder
from cogtrain.distributed.signals import StopRequest
from cogtrain.distributed.snapshot import EMA, OPTIMIZER, WEIGHTS, Snapshot
from cogtrain.distributed.strategy import read_weights
from cogtrain.model import lora
from cogtrain.model.finite import all_finite
from cogtrain.runs.checkpoint import list_checkpoints
from cogtrain.runs.folder import read_run
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings, SftSettings
from cogtrain.trainer import saver
from cogtrain.trainer.trainer import train

pytestmark = pytest.mark.gpu  # NCCL, fp16's scaler, page-locked memory, Triton; about two minutes in all

COMPILE = "on" if torch.cuda.is_available() else "off"  # on a CPU these runs can be tried, and inductor takes minutes
FORMS = ("tiny", "tiny-2b", "tiny-i2v", "tiny-1.5-i2v")
# Strategy, method, form, and settings; the form's own precision, which is fp16 for tiny-2b, else bf16.
DDP = [
    ("ddp", "lora", "tiny", {"compile": COMPILE}),
    ("ddp", "lora", "tiny", {"compile": COMPILE, "memory": "low", "accumulate": 2}),
    ("ddp", "lora", "tiny-i2v", {}),
    ("ddp", "lora", "tiny-2b", {"compile": COMPILE}),
    ("ddp", "sft", "tiny-2b", {}),
    ("ddp", "sft", "tiny-2b", {"memory": "low"}),
    ("ddp", "sft", "tiny-1.5-i2v", {"compile": COMPILE, "memory": "low"}),
]
ZERO = [
    ("zero2", "lora", "tiny", {"compile": COMPILE}),
    ("zero2", "sft", "tiny-i2v", {}),
    ("zero2", "lora", "tiny-2b", {}),
    ("zero2-offload", "sft", "tiny", {}),
    ("zero2-offload", "sft", "tiny-2b", {}),
    ("zero3", "lora", "tiny-i2v", {}),
    ("zero3", "sft", "tiny", {"memory": "low"}),
    ("zero3", "sft", "tiny", {"compile": COMPILE}),
    ("zero3", "lora", "tiny-i2v", {"compile": COMPILE, "memory": "low"}),
    ("zero3-offload", "sft", "tiny-1.5-i2v", {}),
]


def half_of(form):
    """Steps of a run that is then resumed for as many more."""
    return 12 if form == "tiny-2b" else 3


EIGHT_BITS = [
    ("ddp", "lora", "tiny", {"optimizer": "adamw8bit", "rank": 128}),
    ("ddp", "sft", "tiny-i2v", {"optimizer": "adamw8bit"}),
    ("zero2", "sft", "tiny", {"optimizer": "adamw8bit"}),
]
none_there = not (find_spec("bitsandbytes") or find_spec("torchao"))
without_eight_bits = pytest.mark.skipif(none_there, reason="needs bitsandbytes or torchao")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    root = tmp_path_factory.mktemp("shards")
    for form in FORMS:
        make_shards(root / form, form, samples=4, image_variants=1)
        make_shards(root / f"held-{form}", form, samples=1, image_variants=1, seed=9, captions=("held",))
    return root


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(DDP, id="ddp"),
        pytest.param(ZERO, id="zero"),
        pytest.param(EIGHT_BITS, id="8bit", marks=without_eight_bits),
    ],
)
def test_steps_a_checkpoint_a_resume_and_an_export(tmp_path, shards, run_ranks, losses, rows):
    """The export is loaded back and compared by the run itself. Under fp16 many steps at a time: its first overflow."""
    cases = []
    for number, (strategy, method, form, more) in enumerate(rows):
        settings = {
            "shards": [str(shards / form)], "validate_shards": [str(shards / f"held-{form}")], "compile": "off",
            "out": str(tmp_path / str(number)), "strategy": strategy, "lr": 1e-3, "warmup": 0,
        }  # fmt: skip
        settings |= ({"rank": 4} if method == "lora" else {}) | more
        half = half_of(form)
        for steps in (half, 2 * half):
            every = {"steps": steps, "save_every": half, "validate_every": half}
            cases.append({"name": f"{number}-{steps}", "method": method, "settings": settings | every})
    seen = run_ranks(1, cases, tmp_path / "ranks", os.environ)
    for number, (strategy, method, form, more) in enumerate(rows):
        run, row = tmp_path / str(number), (strategy, method, form, more)
        found = losses(run)
        half = half_of(form)
        assert sorted(found) == [*range(1, 2 * half + 1)] and all(map(math.isfinite, found.values())), row
        held_out = read_run(run).validations
        assert [line.step for line in held_out] == [half, 2 * half], row
        assert held_out[1].val_loss != held_out[1].base_val_loss, row  # trained, in spite of fp16's first scales
        assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{n * half}" for n in (1, 2)}, row
        assert seen[f"{number}-{2 * half}"][0]["samples"] != seen[f"{number}-{half}"][0]["samples"], row  # it went on
        if method == "lora":
            state = load_file(run / lora.FILE)
            assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in state.values()), row
        else:
            assert (run / "transformer/config.json").is_file(), row


NAN = [
    ("ddp", "lora", "tiny", {}),
    ("ddp", "lora", "tiny", {"memory": "low", "accumulate": 2}),
    ("ddp", "lora", "tiny-2b", {}),
    ("ddp", "sft", "tiny-i2v", {}),
    ("ddp", "sft", "tiny", {"memory": "low"}),
    ("zero2", "sft", "tiny", {}),
    ("zero2", "sft", "tiny-2b", {}),
    ("zero2-offload", "sft", "tiny", {}),
    ("zero3", "sft", "tiny", {}),
]


def test_a_nan_gradient_is_in_no_checkpoint(tmp_path, shards, run_ranks):
    """In step 5, where fp16 has found its scale; with fp16 the step is left out, as one whose gradients overflow."""
    cases = []
    for number, (strategy, method, form, more) in enumerate(NAN):
        for name, spoilt in (("whole", []), ("run", [5]), ("run", [])):
            settings = {
                "shards": [str(shards / form)], "compile": "off", "out": str(tmp_path / f"{number}-{name}"),
                "strategy": strategy, "lr": 1e-3, "warmup": 0, "steps": 6, "save_every": 2,
            }  # fmt: skip
            settings |= ({"rank": 4} if method == "lora" else {}) | more
            case = {"name": f"{number}-{name}-{len(spoilt)}", "method": method, "nan_gradient": spoilt}
            cases.append(case | {"settings": settings})
    seen = run_ranks(1, cases, tmp_path / "ranks", os.environ)
    for number, row in enumerate(NAN):
        spoilt, resumed = (seen[f"{number}-run-{count}"][0] for count in (1, 0))
        runs = [tmp_path / f"{number}-{name}" for name in ("whole", "run")]
        for folder in (folder for run in runs for folder in list_checkpoints(run)):
            assert all_finite(read_weights(folder).values()), (row, folder)
        assert "error" not in resumed, row
        if row[2] == "tiny-2b":  # fp16
            assert "error" not in spoilt, (row, spoilt.get("error"))
            continue
        assert "the gradient is not finite" in spoilt["error"][1], (row, spoilt.get("error"))
        whole, run = ([line.loss for line in read_run(run).steps] for run in runs)
        assert run == pytest.approx(whole, rel=2e-2), row  # bf16


def test_what_is_trained_there_generates_there(tmp_path, shards):
    for words in (
        ["lora", "--shards", str(shards / "tiny"), "--steps", "1", "--rank", "4", "--compile", "off",
         "--validate-shards", str(shards / "held-tiny"), "--validate-videos", "1", "--validate-prompt", "a red ball"],
        ["generate", "--run", str(tmp_path), "--prompt", "a red ball", "--steps", "2"],
    ):  # fmt: skip
        words += ["--out", str(tmp_path)] if words[0] == "lora" else []
        done = subprocess.run([sys.executable, "-m", "cogtrain", *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name in ("tuned.mp4", "base.mp4"):
        assert next(tmp_path.rglob(name)).stat().st_size > 500
    assert (tmp_path / "validation/step-000001/0.mp4").stat().st_size > 500
    assert next(tmp_path.glob("validation/step-000001/a-red-ball-*.mp4")).stat().st_size > 500


def test_a_checkpoint_that_is_written_beside_the_next_steps_holds_none_of_them(tmp_path, shards, monkeypatch):
    copied, noted = Snapshot.copied, []

    def noting(snapshot):
        now = [*snapshot.weights], [tensor.detach().to("cpu", copy=True) for tensor in snapshot.tensors]
        copy = copied(snapshot)
        noted.append(now)  # a copy that is refused makes training wait, and is not noted
        return copy

    monkeypatch.setattr(Snapshot, "copied", noting)
    monkeypatch.setattr(saver, "left_beside", lambda *_: 1 << 40)
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"shards": [str(shards / "tiny-2b")], "compile": "off", "out": tmp_path / "run", "ema": 0.9, "keep": 9}
    train(open_run(SftSettings(**given, steps=4, save_every=1), pick_device(), 1), StopRequest())
    assert len(noted) == 4
    for step, (names, tensors) in enumerate(noted, 1):
        folder = tmp_path / f"run/checkpoint-{step}"
        weights, average = (load_file(folder / file) for file in (WEIGHTS, EMA))
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        order = ({name: part[name] for name in names} for part in (weights, average))
        assert all(map(torch.equal, Snapshot(*order, state).tensors, tensors)), step
        assert max(tensor.nbytes for tensor in tensors) > 1 << 16  # so that some went in pieces


def test_t5_has_left_the_gpu_when_the_transformer_comes(tmp_path, shards, monkeypatch):
    square = torch.ones(64, 64, device=pick_device())
    square @ square  # cuBLAS keeps tens of MB from its first product on
    before, held = torch.cuda.memory_allocated(), {}

    def note(cls, name):
        method = getattr(cls, name)

        def noting(*given):
            held.setdefault(name, torch.cuda.memory_allocated() - before)
            return method(*given)

        monkeypatch.setattr(cls, name, noting)

    note(TextEncoder, "encode_batch")
    note(Checkpoint, "load_transformer")
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"shards": [str(shards / "tiny")], "rank": 4, "compile": "off", "steps": 1, "out": tmp_path / "run"}
    settings = LoraSettings(**given, validate_prompt=["a red ball"])
    train(open_run(settings, pick_device(), 1), StopRequest())
    print(f"bytes of the GPU held: {held}")
    assert list(held) == ["encode_batch", "load_transformer"]
    assert held["load_transformer"] <= 0.1 * held["encode_batch"]
