"""A child that trains on a disk that is full from its n-th write on, then has room again, for every n it is given.

Usage: disk_full.py CASE.json, under full_disk.c. The case: {"out": folder, "shards": [...], "settings": {...}, "at":
[[pattern, n], ...]}: the files, as the run's folder names them, and which write to them; a fraction of all writes of
the first run; -1 for none. Prints one JSON line each: what the run said, and the losses and the digest of the weights
once there was room again.
"""

import ctypes
import hashlib
import json
import shutil
import sys
from pathlib import Path


def digest(run):
    import safetensors.torch

    from cogtrain.model import lora

    state = safetensors.torch.load_file(run / lora.FILE)
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def main(case):
    import torch
    from accelerate.state import AcceleratorState

    from cogcommon.errors import DiskError
    from cogcommon.libraries import quiet_libraries
    from cogcommon.model.device import pick_device
    from cogtrain.distributed.signals import StopRequest
    from cogtrain.runs.checkpoint import list_checkpoints
    from cogtrain.runs.folder import read_run
    from cogtrain.runs.opening import open_run
    from cogtrain.settings.training import LoraSettings
    from cogtrain.trainer.trainer import train

    pick_device()
    quiet_libraries()
    layer = ctypes.CDLL(None)
    out = Path(case["out"])

    def run():
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = LoraSettings(**{"shards": case["shards"], "out": out / "run"} | case["settings"])
        return train(open_run(settings, torch.device("cpu"), 1), StopRequest())

    writes = 0
    for pattern, n in case["at"]:
        shutil.rmtree(out / "run", ignore_errors=True)
        said = ""
        number = round(n * writes) if 0 < n < 1 else n
        layer.full_disk(f"{out}{pattern}".encode(), ctypes.c_long(number))
        try:
            run()
        except DiskError as error:
            said = str(error)
        made = layer.full_disk_writes()
        writes = writes or made
        left = [path.name for path in (out / "run").glob(".*.tmp")] if (out / "run").exists() else []
        kept = [path.name for path in list_checkpoints(out / "run")]
        layer.full_disk(b"", ctypes.c_long(-1))
        folder = run()
        losses = [line.loss for line in read_run(folder).steps]
        print(
            json.dumps({
                "at": [pattern, number], "said": said, "writes": made, "left": left, "kept": kept,
                "losses": losses, "weights": digest(folder), "report": (folder / "report.html").is_file(),
            }),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
