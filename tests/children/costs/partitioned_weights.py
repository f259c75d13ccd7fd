"""One rank of two: runs our blocks under ZeRO-3, and counts the gathered weights that live between the two passes.

Usage: torchrun ... partitioned_weights.py OUT. Rank 0 writes OUT/held.json: by plan, the bytes that autograd still
holds of the weights that DeepSpeed gathered for the forward pass, relative to all blocks'.
"""

import functools
import gc
import json
import os
import sys
import weakref
from pathlib import Path

from cogcommon.libraries import quiet_libraries
from cogcommon.model.device import pick_device

device = pick_device(int(os.environ["LOCAL_RANK"]))
quiet_libraries()

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from live_bytes import SHAPE, ZERO, inputs_of  # noqa: E402

from cogtrain.blocks.engine import BlockEngine  # noqa: E402
from cogtrain.blocks.plan import BlockPlan  # noqa: E402
from cogtrain.distributed import zero  # noqa: E402
from cogtrain.distributed.optimizer import make_optimizer  # noqa: E402
from cogtrain.distributed.strategy import start  # noqa: E402
from cogtrain.model.method import Sft  # noqa: E402
from cogtrain.settings.training import SftSettings  # noqa: E402
from workshop.bench_train.subject import random_checkpoint  # noqa: E402

LAYERS = 6
# DeepSpeed keeps nothing for the backward pass itself.
SHORT = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}
gathered = {}  # bytes by storage
most = []  # at once


class Watched(BlockEngine):
    def _weights_of(self, index, training):
        weights = super()._weights_of(index, training)
        for weight in weights:
            storage = weight.untyped_storage()
            if weight.numel() > 1000 and storage._cdata not in gathered:
                gathered[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, gathered.pop, storage._cdata, None)
        most.append(sum(gathered.values()))
        return weights


def held(keep, park, file):
    """And the most that was gathered at once, to see that something was."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = SftSettings(strategy="zero3", deepspeed=file)
    runtime = start(settings, "zero3", "bf16", cpu=True)
    checkpoint = random_checkpoint("5b", SHAPE | {"num_layers": LAYERS})
    transformer = checkpoint.load_transformer(torch.bfloat16)
    Sft().apply(transformer)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone()  # random weights share their memory
    size = sum(2 * p.numel() for block in transformer.transformer_blocks for p in block.parameters())
    zero.gather_by_block(transformer)
    plan = BlockPlan((keep,) * LAYERS, offload_activations=park, compiled=True)
    Watched(transformer, plan, device, torch.bfloat16, partitioned=True).offload_all()
    optimizer = make_optimizer(list(transformer.parameters()), settings, device, offload_optimizer=False)
    model, optimizer = runtime.prepare(transformer.train(), optimizer, saved_by=None)
    for _ in range(2):
        gathered.clear()
        most.clear()
        loss = model(**inputs_of(checkpoint), return_dict=False)[0].float().square().mean()
        gc.collect()
        between = sum(gathered.values())
        runtime.accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return {"most": max(most) / size, "between": between / size}


if __name__ == "__main__":
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    out, rank = Path(sys.argv[1]), os.environ["RANK"]
    file = out / f"deepspeed-{rank}.json"
    file.write_text(json.dumps({"zero_optimization": ZERO | SHORT}))
    found = {
        f"{keep}, {'parked' if park else 'kept'}": held(keep, park, file)
        for keep in ("attention", "matmuls")
        for park in (False, True)
    }
    if rank == "0":
        (out / "held.json").write_text(json.dumps(found))
