"""What is measured: a transformer of a published shape with random weights, and samples for it, in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcommon import __version__
from cogcommon.model.checkpoint import Checkpoint, WeightsIdentity, open_checkpoint
from cogcommon.model.families import BY_NAME, RANDOM, Family, Resolution
from cogcommon.model.published import published
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import ShardHeader
from cogcommon.store.fsspec_store import FsspecStore
from cogcommon.store.store import StoredFile
from cogtrain.data.sampler import Sampler
from cogtrain.data.shard_set import Shard, ShardSet
from cogtrain.distributed.zero_config import choose_strategy
from cogtrain.model.method import method_of
from cogtrain.runs.run import Run
from cogtrain.settings.training import TrainSettings

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel

_DRAWN = (1 << 24) + 7  # random numbers; what is longer repeats them
_SPARE = 1 << 24  # numbers that weights of one fan-in have between the first and the last place to begin at


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """A checkpoint whose transformer has a published shape and random weights."""

    def load_transformer(self, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
        import torch
        from diffusers import CogVideoXTransformer3DModel

        config = dict(self.transformer_config)
        # Position tables are buffers, which a model made without memory would lose; the blocks have none.
        transformer = CogVideoXTransformer3DModel.from_config(config | {"num_layers": 0})
        with torch.device("meta"):
            blocks = CogVideoXTransformer3DModel.from_config(config).transformer_blocks
        transformer.transformer_blocks = blocks.to(dtype).to_empty(device="cpu")
        transformer.register_to_config(num_layers=len(blocks))
        transformer.to(dtype)
        _fill(transformer, dtype)
        return transformer.eval()


def _fill(transformer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Matrices normal with variance 1/fan_in, norms one, biases zero.

    Matrices of one fan-in are windows of the same memory, each from another place on: 5B is made in a
    second and takes 0.4 GiB of host memory, not 10.4. What a run moves, it copies. Whatever the type, the numbers
    are bf16's, as the published ones are: masters that lie between them move a bf16 copy at once, others later.
    """
    import torch

    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0))
    places = random.Random(0)
    longest: dict[int, int] = {}
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            longest[fan_in] = max(longest.get(fan_in, 0), parameter.numel())
    spare = min(_SPARE, max(longest.values()))
    numbers = {
        fan_in: (drawn / math.sqrt(fan_in)).bfloat16().to(dtype).repeat(-(-(size + spare) // _DRAWN))[: size + spare]
        for fan_in, size in longest.items()
    }
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") and "linear" not in name else 0.0)
                continue
            start = places.randrange(0, spare, 8)
            window = numbers[parameter[0].numel()][start : start + parameter.numel()]
            parameter.data = window.view(parameter.shape)


def random_checkpoint(family_name: str, shape: Mapping[str, Any] | None = None) -> RandomCheckpoint:
    """A checkpoint of a family.

    Args:
        shape: entries of the transformer's config that differ from the published ones.
    """
    form = open_checkpoint(RANDOM + BY_NAME[family_name].builtin)
    config = dict(published(form.family).transformer_config)
    known = {field.name: getattr(form, field.name) for field in dataclasses.fields(form)}
    # As if from the hub: its VAE is never opened.
    known |= {"name": f"random {family_name}", "on_hub": True, "revision": "none"}
    return RandomCheckpoint(**known | {"transformer_config": config | dict(shape or {})})


def random_run(settings: TrainSettings, checkpoint: Checkpoint, shards: ShardSet, world: int = 1) -> Run:
    """The run of these settings on random samples; nothing of the checkpoint is loaded."""
    method = method_of(settings)
    return Run(
        settings=settings,
        given=settings,
        method=method,
        shards=shards,
        held_out=None,
        checkpoint=checkpoint,
        sampler=Sampler(shards.shard_of, shards.bucket_of, world * settings.batch_size, settings.seed),
        steps=settings.steps or 1000,
        strategy=choose_strategy(settings, full=method.full, gpus=world),
        precision=settings.precision or checkpoint.family.precision,
        world=world,
        resume=None,
        notes=(),
    )


def random_shards(checkpoint: Checkpoint, bucket: Resolution, samples: int = 8) -> ShardSet:
    """A shard of random samples, read and checked as any other, from memory."""
    import fsspec
    import pyarrow as pa
    import safetensors.torch
    import torch

    family = checkpoint.family
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    latent = family.latent(bucket)
    still = latent.still
    text = (checkpoint.transformer_config["max_text_seq_length"], checkpoint.transformer_config["text_embed_dim"])
    rows, data = [], b""
    for number in range(samples):
        tensors = {"latent_mean": normal(*latent), "latent_std": normal(*latent).abs() * 0.1, "text": normal(*text)}
        if family.task == "i2v":
            tensors |= {"image_mean": normal(1, *still), "image_clean_mean": normal(*still)}
        info = json.dumps({"caption": f"sample {number}"}).encode()
        raw = safetensors.torch.save(tensors)
        rows.append(
            {
                "key": hashlib.sha256(info).hexdigest()[:32], "status": "ok", "bucket": str(bucket),
                "offset": len(data), "size": len(info) + len(raw), "json_offset": len(data), "json_size": len(info),
                "tensors_offset": len(data) + len(info), "tensors_size": len(raw),
                "sha256": hashlib.sha256(info + raw).digest(), "source_sha256": hashlib.sha256(info).digest(),
                "shard": 0,
            }
        )  # fmt: skip
        data += info + raw
    fs = fsspec.filesystem("memory")
    fs.pipe("/bench.tar", data)
    file = StoredFile(FsspecStore(fs), "/bench.tar", "memory")
    header = ShardHeader(0, len(data), hashlib.sha256(data).hexdigest(), _contract(checkpoint, family, bucket))
    return ShardSet([Shard(file, header, record=file, empty_caption=file)], pa.Table.from_pylist(rows), [bucket])


def _contract(checkpoint: Checkpoint, family: Family, bucket: Resolution) -> Contract:
    nobody = WeightsIdentity(checkpoint.name, checkpoint.revision, "", "")
    return Contract(
        family=family.name,
        task=family.task,
        model=checkpoint.name,
        revision=checkpoint.revision,
        vae=nobody,
        text_encoder=nobody,
        scaling_factor=checkpoint.vae_config["scaling_factor"],
        posterior="moments",
        image_variants=1 if family.task == "i2v" else 0,
        tiling="off",
        dtype="float32",
        text_tokens=checkpoint.transformer_config["max_text_seq_length"],
        text_dim=checkpoint.transformer_config["text_embed_dim"],
        settings={"resolution": [str(bucket)]},
        tool_version=__version__,
    )
