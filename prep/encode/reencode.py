"""Encode samples of a finished folder again, to see how far apart two encodes are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogcommon.cli.progress import stage
from cogcommon.errors import ShardError
from cogcommon.libraries import quiet_libraries
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.device import dtype_of, pick_device
from cogcommon.model.families import Resolution
from cogcommon.model.text_encoder import TextEncoder
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import TEXT, SampleRow, ShardRecord

from ..plan.moved import named_now
from ..plan.origin import read_origin
from ..processes.pool import Pool
from ..source.clip import ClipFault
from ..store.committed import read_tensors
from ..vae.encoder import LatentEncoder
from ..video.cut import Cut
from ..video.decode import decode_clip

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Difference:
    """A sample encoded again: the largest absolute difference of any tensor."""

    source: str
    largest: float
    tensor: str


def encode_again(
    out: Path,
    contract: Contract,
    shards: Sequence[tuple[Path, ShardRecord]],
    *,
    count: int,
    workers: int,
    model: str | None = None,
) -> list[Difference]:
    """Encode ``count`` samples, spread over the folder, from their clips.

    Args:
        model: the checkpoint, if it is elsewhere than the contract says.

    Raises:
        ShardError: the folder does not say where its clips are, or a clip is not the one that was encoded.
        ModelError: the model cannot be had.
    """
    origin = read_origin(out)
    if origin is None:
        raise ShardError("the folder does not say where its clips are", where=str(out / "origin.json"))
    root = Path(origin.data_root)
    everything = [(tar, row) for tar, record in shards for row in record.rows if row.status == "ok"]
    count = min(count, len(everything))
    if not count:
        return []
    chosen = [everything[index * len(everything) // count] for index in range(count)]
    rows = named_now(origin, contract.task, [row for _, row in chosen])
    chosen = [(tar, row) for (tar, _), row in zip(chosen, rows, strict=True)]
    latents, text = _models(out, contract, model)
    cut = Cut.of(contract)
    tasks = (
        (
            root / row.source,
            Resolution.parse(row.bucket),
            cut,
            contract.family_row.fps,
            row.key,
            root / row.image if row.image else None,
        )
        for _, row in chosen
    )
    differences = []
    with Pool(workers) as pool, stage("encoding again", count, "sample") as bar:
        for (tar, row), clip in zip(chosen, pool.run(decode_clip, tasks), strict=True):
            if isinstance(clip, ClipFault):
                raise ShardError(f"{row.source} cannot be decoded again: {clip.reason}", where=str(root / row.source))
            image = clip.frames_FHWC[0] if clip.image_HWC is None else clip.image_HWC
            again = latents.encode(row.key, clip.frames_FHWC, image if contract.task == "i2v" else None).tensors
            again[TEXT], _ = text.encode(row.caption)
            differences.append(_compare(row, read_tensors(tar, row), again))
            bar.advance()
    return differences


@stage("loading the models")
def _models(out: Path, contract: Contract, model: str | None) -> tuple[LatentEncoder, TextEncoder]:
    device = pick_device()
    quiet_libraries()
    checkpoint = open_checkpoint(
        model or contract.model,
        None if model else contract.revision,
        named_by=None if model else f"the contract of {out}",
    )
    dtype = dtype_of(contract.dtype)
    latents = LatentEncoder(
        checkpoint.load_vae(dtype).to(device),
        device,
        posterior=contract.posterior,
        tiling=contract.tiling,
        image_variants=contract.image_variants,
        seed=Cut.of(contract).seed if "seed" in contract.settings else 0,
    )
    return latents, TextEncoder(checkpoint, device, dtype)


def _compare(row: SampleRow, stored: dict[str, torch.Tensor], again: dict[str, torch.Tensor]) -> Difference:
    by_name = {name: (stored[name].double() - again[name].double()).abs().max().item() for name in stored}
    worst = max(by_name, key=lambda name: by_name[name])
    return Difference(row.source, by_name[worst], worst)
