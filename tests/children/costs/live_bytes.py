"""One rank of two: trains three steps in each way, and counts the bytes of all tensors that live meanwhile.

Usage: torchrun ... live_bytes.py WAYS OUT, where a way is STRATEGY:OPTIMIZER or STRATEGY:OPTIMIZER:ema. Rank 0 writes
OUT/<way>.json: weights, and bytes in the backward pass's end (``held``) and at the most in the optimizer's step
(``step``); there are no activations then.
"""

import gc
import json
import os
import sys
from pathlib import Path

from cogcommon.libraries import quiet_libraries
from cogcommon.model.device import pick_device

pick_device(int(os.environ["LOCAL_RANK"]))
quiet_libraries()

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from live import Live  # noqa: E402

from cogtrain.distributed.optimizer import make_optimizer  # noqa: E402
from cogtrain.distributed.strategies import STRATEGIES  # noqa: E402
from cogtrain.distributed.strategy import start  # noqa: E402
from cogtrain.model.ema import EMA  # noqa: E402
from cogtrain.model.method import Sft  # noqa: E402
from cogtrain.model.objective import Objective  # noqa: E402
from cogtrain.settings.training import SftSettings  # noqa: E402
from workshop.bench_train.rows import SMALL  # noqa: E402
from workshop.bench_train.subject import random_checkpoint  # noqa: E402

# Large weights beside few tokens and small buckets; weights that ZeRO-3 would leave everywhere are not few here.
SHAPE = SMALL | {"num_attention_heads": 8, "attention_head_dim": 32}
ZERO = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000, "stage3_param_persistence_threshold": 0}


def inputs_of(checkpoint):
    objective = Objective.of(checkpoint)
    config = checkpoint.transformer_config
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    text = normal(1, config["max_text_seq_length"], config["text_embed_dim"])
    noisy = normal(1, objective.family.padded_frames(5), 16, 8, 12)
    return objective.model_inputs(noisy, {}, text, torch.tensor([300]), torch.bfloat16)


def measure(way, file):
    strategy, optimizer, *ema = way.split(":")
    sharded = strategy != "ddp"
    settings = SftSettings(
        strategy=strategy, deepspeed=file if sharded else None, optimizer=optimizer,
        lr=1.0 if optimizer == "prodigy" else 1e-5,
    )  # fmt: skip
    runtime = start(settings, strategy, "bf16", cpu=True)
    checkpoint, method, live = random_checkpoint("5b", SHAPE), Sft(), Live()
    transformer = checkpoint.load_transformer(method.weight_dtype(torch.bfloat16, sharded))
    method.apply(transformer)
    found = {"weights": sum(parameter.numel() for parameter in transformer.parameters())}
    for tensor in [*transformer.parameters(), *transformer.buffers()]:
        tensor.data = tensor.data.clone()  # random weights share their memory
        live.count(tensor)
    with live:
        parameters = list(transformer.parameters())
        # As on a GPU, where the update is fused and needs nothing of its own.
        offload_optimizer = STRATEGIES[strategy].offloads
        optimizer = make_optimizer(parameters, settings, torch.device("cuda"), offload_optimizer=offload_optimizer)
        model, optimizer = runtime.prepare(transformer.train(), optimizer, saved_by=None)
        average = EMA(parameters, 0.9) if ema else None
        stepping = model.optimizer if sharded else optimizer
        make_step = stepping.step

        def step(*arguments, **options):
            gc.collect()
            found["held"] = live.most = live.now
            make_step(*arguments, **options)
            found["step"] = live.most

        stepping.step = step
        for _ in range(3):  # the moments come with the first
            loss = model(**inputs_of(checkpoint), return_dict=False)[0].float().square().mean()
            runtime.accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update(1)
            del loss
    return found


if __name__ == "__main__":
    torch.compiler.set_stance("force_eager")  # torchao would compile its step for minutes
    out, rank = Path(sys.argv[2]), os.environ["RANK"]
    file = out / f"deepspeed-{rank}.json"
    file.write_text(json.dumps({"zero_optimization": ZERO}))
    for name in sys.argv[1].split(","):
        AcceleratorState._reset_state(reset_partial_state=True)
        result = measure(name, file)
        gc.collect()
        if rank == "0":
            (out / f"{name.replace(':', '-')}.json").write_text(json.dumps(result))
