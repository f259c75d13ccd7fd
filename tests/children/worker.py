"""One rank of a test's process group: runs several trainings one after the other and writes down what it saw.

Usage: torchrun ... worker.py CASES.json OUT. A case is {"name", "method", "settings"} and perhaps {"spoil": i},
which makes sample i NaN, {"nan_gradient": steps}, {"compiler": name}, a backend of torch.compile, {"full": pattern},
files for which the disk is full (full_disk.c), {"groups": n}, so many data-parallel groups, or {"other": {"folder",
"settings"}}, the working folder of rank 1 and
settings of its own; rank r writes OUT/<name>-<r>.json with
the samples it took, what was drawn for them, the live optimizer's values, and, where {"refused": true} or its gradients
are NaN, the error and the seconds until it came.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from nan_gradient import make_gradients_nan

from cogcommon.errors import CogError
from cogcommon.libraries import quiet_libraries
from cogcommon.model.device import pick_device

device = pick_device(int(os.environ["LOCAL_RANK"]))
quiet_libraries()

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from cogtrain.data import batches  # noqa: E402
from cogtrain.distributed.groups import DataGroups  # noqa: E402
from cogtrain.distributed.peers import meet  # noqa: E402
from cogtrain.distributed.signals import StopRequest  # noqa: E402
from cogtrain.distributed.strategy import Runtime  # noqa: E402
from cogtrain.model.objective import Objective  # noqa: E402
from cogtrain.runs import opening  # noqa: E402
from cogtrain.runs import run as run_module  # noqa: E402
from cogtrain.runs.opening import open_run  # noqa: E402
from cogtrain.settings.training import LoraSettings, SftSettings  # noqa: E402
from cogtrain.trainer.trainer import train  # noqa: E402


def digest(tensor):
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def main(cases, out):
    seen = {}
    losses, prepare = Objective.losses, Runtime.prepare

    def watched_losses(self, transformer, batch, dtype):
        if transformer.training:
            for row, key in enumerate(batch.keys):
                seen["samples"].append([key, int(batch.timestep_B[row]), digest(batch.noise_BFCHW[row])])
        return losses(self, transformer, batch, dtype)

    def watched_prepare(self, *args, **named):
        model, optimizer = prepare(self, *args, **named)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k in ("lr", "betas", "eps", "weight_decay")}
        seen["optimizer"] = {
            "kind": type(getattr(optimizer.optimizer, "optimizer", optimizer.optimizer)).__name__,
            **group,
        }
        if self.sharded:
            seen["engine"] = {
                "clip": model.gradient_clipping(),
                "accumulate": model.gradient_accumulation_steps(),
                "micro": model.train_micro_batch_size_per_gpu(),
                "batch": model.train_batch_size(),
                "stage": model.zero_optimization_stage(),
                "optimizer offload": str(getattr(model.zero_offload_optimizer(), "device", None)),
                "parameter offload": str(getattr(model.zero_offload_param(), "device", None)),
            }
        return model, optimizer

    Objective.losses, Runtime.prepare = watched_losses, watched_prepare
    nan_gradient_at = make_gradients_nan()
    rank = os.environ["RANK"]
    peers = meet()
    read = batches.read_sample
    for case in cases:
        seen.clear()
        seen["samples"] = []
        AcceleratorState._reset_state(reset_partial_state=True)
        cls = {"lora": LoraSettings, "sft": SftSettings}[case["method"]]
        other = case.get("other", {}) if rank != "0" else {}
        os.chdir(other.get("folder", out))
        settings = case["settings"] | other.get("settings", {})
        settings = {k: Path(v) if k in ("out", "deepspeed", "nvme") else v for k, v in settings.items()}
        spoilt = case.get("spoil")

        def read_spoilt(shards, index, stop=None, spoilt=spoilt):
            sample = read(shards, index)
            return sample if index != spoilt else dataclasses.replace(sample, text=sample.text * float("nan"))

        batches.read_sample = read_spoilt
        nan_gradient_at(case.get("nan_gradient"))
        if "full" in case:
            ctypes.CDLL(None).full_disk(case["full"].encode(), ctypes.c_long(1))
        if "groups" in case:
            opening.data_groups = run_module.data_groups = functools.partial(DataGroups, count=case["groups"])
        if "compiler" in case:
            torch.compile = functools.partial(torch.compile, backend=case["compiler"])
        began = time.monotonic()
        try:
            run = peers.together(lambda: open_run(cls(**settings), device, peers.world, peers))  # noqa: B023
            train(run, StopRequest(), peers)
        except CogError as error:
            if not (case.get("refused") or case.get("nan_gradient")):
                raise
            seen["error"] = [type(error).__name__, str(error), time.monotonic() - began]
        # An 8-bit optimizer has its rate in a tensor.
        (out / f"{case['name']}-{rank}.json").write_text(json.dumps(seen, default=float))


main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
