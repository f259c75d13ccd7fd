"""One run of a 5B's shape, validated after its two steps: `python peaks.py STRATEGY MEMORY small|true OUT`.

Weights and samples are random and made in memory. A video of two sampling steps instead of fifty: its memory is
that of one step. The base model is not measured: it would only take time.
"""

import dataclasses
import sys
from pathlib import Path

from cogcommon.libraries import quiet_libraries
from cogcommon.model.device import pick_device

device = pick_device()
quiet_libraries()

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKLCogVideoX  # noqa: E402

import cogtrain.validation.videos  # noqa: E402
from cogtrain.data.sampler import Sampler  # noqa: E402
from cogtrain.data.shard_set import ShardSet  # noqa: E402
from cogtrain.distributed.signals import StopRequest  # noqa: E402
from cogtrain.model.method import Lora  # noqa: E402
from cogtrain.runs.run import Run  # noqa: E402
from cogtrain.settings.training import LoraSettings  # noqa: E402
from cogtrain.trainer.trainer import train  # noqa: E402
from cogtrain.validation.validate import Validation  # noqa: E402
from workshop.bench_train.rows import SMALL, SMALL_BUCKET  # noqa: E402
from workshop.bench_train.subject import RandomCheckpoint, random_checkpoint, random_shards  # noqa: E402

PUBLISHED_VAE = {"block_out_channels": (128, 256, 256, 512), "layers_per_block": 3, "norm_num_groups": 32}
STEPS = 2


class WithVae(RandomCheckpoint):
    def load_vae(self, dtype):
        vae = AutoencoderKLCogVideoX.from_config(dict(self.vae_config) | ({} if small else PUBLISHED_VAE))
        return vae.to(dtype).eval().requires_grad_(False)


strategy, memory, size, out = sys.argv[1:]
small = size == "small"
known = random_checkpoint("5b", SMALL if small else None)
checkpoint = WithVae(**{field.name: getattr(known, field.name) for field in dataclasses.fields(known)})
shards = random_shards(checkpoint, SMALL_BUCKET if small else checkpoint.family.native, samples=1)
settings = LoraSettings(
    rank=4 if small else 128, strategy=strategy, memory=memory, out=Path(out), steps=STEPS, warmup=0,
    validate_every=STEPS, validate_videos=1,
)  # fmt: skip
empty = safetensors.torch.save({"text": torch.zeros(1, 1).expand(226, known.transformer_config["text_embed_dim"])
                                .contiguous()})  # fmt: skip
ShardSet.empty_caption = lambda self: empty
Validation._remembered = lambda self: 1.0
cogtrain.validation.videos.denoise.__kwdefaults__["steps"] = 2
train(
    Run(
        settings=settings, given=settings, method=Lora(settings), shards=shards, held_out=shards, checkpoint=checkpoint,
        sampler=Sampler(shards.shard_of, shards.bucket_of, 1, settings.seed), steps=STEPS, strategy=strategy,
        precision="bf16" if device.type == "cuda" else "fp32", world=1, resume=None, notes=(),
    ),
    StopRequest(),
)  # fmt: skip
