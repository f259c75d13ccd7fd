"""Batches: samples read from their shards, random draws added, collated, all ahead of the training loop."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogcommon.errors import ShardError
from cogcommon.files.memory import LARGE
from cogcommon.files.readers import Readers
from cogcommon.shards.records import LATENT_MEAN, LATENT_STD, TEXT, split_extent
from cogcommon.store.store import Stop

from ..model.batch import Batch
from ..model.objective import Objective
from .sample_rng import Purpose, SampleRNG
from .sampler import Slot
from .shard_set import ShardSet

if TYPE_CHECKING:
    import torch

    from cogcommon.model.checkpoint import Checkpoint
    from cogcommon.model.families import Resolution

_VARIANTS = 4  # noised images of a stored sample, unless the encode was told otherwise
_FETCHED = 64  # batches on the way to the cache: two minutes of training, which hide as long a stall
AHEAD = 4  # batches in the making
READERS = 4  # threads; reading, hashing and drawing all release the GIL


@dataclass(frozen=True)
class StoredSample:
    """A sample as its shard holds it, (C, F, h, w), unscaled; std is None where one draw was stored."""

    key: str
    shard: str
    caption: str
    latent_mean: torch.Tensor
    latent_std: torch.Tensor | None
    text: torch.Tensor  # (L, D)
    conditions: Mapping[str, torch.Tensor]  # all that lies beside these, by its name in the shard


def read_sample(shards: ShardSet, index: int, stop: Stop | None = None) -> StoredSample:
    """Read one sample.

    Raises:
        ShardError: its bytes are damaged; the shard is named.
        StoreError: they cannot be read, and why.
    """
    extent = shards.extent(index)
    shown = shards.shards[extent.shard].shown
    info, raw = split_extent(memoryview(shards.read(extent, stop)), dataclasses.asdict(extent))
    tensors = _tensors(raw)
    resolution = extent.bucket
    if tuple(tensors[LATENT_MEAN].shape) != shards.contract.family_row.latent(resolution):
        raise ShardError(
            f"sample {extent.key} has latents {tuple(tensors[LATENT_MEAN].shape)}, its bucket is {resolution}",
            where=shown,
            fix="encode this folder again",
        )
    return StoredSample(
        key=extent.key,
        shard=shown,
        caption=info["caption"],
        latent_mean=tensors.pop(LATENT_MEAN),
        latent_std=tensors.pop(LATENT_STD, None),
        text=tensors.pop(TEXT),
        conditions=tensors,
    )


def _tensors(raw: memoryview) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in its own memory.

    safetensors.torch.load wants `bytes` and copies: two copies of 6 MB take as long as reading and hashing them.
    """
    import torch

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # what `cogprep encode` writes
    start = 8 + int.from_bytes(raw[:8], "little")
    described = json.loads(bytes(raw[8:start]))
    described.pop("__metadata__", None)
    return {
        name: torch.frombuffer(raw[start:], dtype=types[one["dtype"]], offset=one["data_offsets"][0],
                               count=math.prod(one["shape"])).view(one["shape"])
        for name, one in described.items()
    }  # fmt: skip


@dataclass(frozen=True)
class Collator:
    """Makes a batch of stored samples, with everything that is random about them.

    Args:
        objective: knows the padding and the number of timesteps.
        seed: of the run.
        stratify: spread the timesteps of a global batch of this many samples; None draws each alone.
        caption_dropout: probability of the empty caption.
        empty_text: its embedding (L, D), where there is any dropout.
        held_out: for validation: the posterior's mean and the clean image, nothing dropped.
    """

    objective: Objective
    seed: int
    stratify: int | None = None
    caption_dropout: float = 0.0
    empty_text: torch.Tensor | None = None
    held_out: bool = False

    def __call__(
        self, samples: Sequence[StoredSample], slots: Sequence[Slot], timesteps: Sequence[int] | None = None
    ) -> Batch:
        """Draw and stack.

        Args:
            slots: the samples' places; epoch and slot enter the draws.
            timesteps: fixed ones instead of drawn ones (validation).
        """
        import torch

        latents, noises, texts, drawn = [], [], [], []
        conditions: dict[str, list[torch.Tensor]] = {name: [] for name in self.objective.family.conditions}
        for sample, slot in zip(samples, slots, strict=True):
            rng = SampleRNG(self.seed, slot.epoch, f"{sample.key} {slot.turn}" if slot.turn else sample.key)
            latent = self._posterior(rng, sample.latent_mean, sample.latent_std, "posterior").transpose(0, 1)
            latents.append(latent)
            frames, *rest = latent.shape
            noises.append(rng.normal((self.objective.family.padded_frames(frames), *rest), "noise"))
            text = sample.text
            if self.empty_text is not None and rng.uniform("caption") < self.caption_dropout:
                text = self.empty_text
            texts.append(text)
            for name, each in conditions.items():
                each.append(self._condition(rng, sample.conditions, name).transpose(0, 1))
            place = None if self.stratify is None else slot.slot
            drawn.append(rng.timestep(len(self.objective.schedule), place, self.stratify or 1))
        return Batch(
            keys=tuple(sample.key for sample in samples),
            shards=tuple(sample.shard for sample in samples),
            latent_BFCHW=torch.stack(latents),
            noise_BFCHW=torch.stack(noises),
            timestep_B=torch.tensor(drawn if timesteps is None else list(timesteps)),
            text_BLD=torch.stack(texts),
            conditions={name: torch.stack(each) for name, each in conditions.items()},
        )

    def _posterior(
        self, rng: SampleRNG, mean: torch.Tensor, std: torch.Tensor | None, purpose: Purpose
    ) -> torch.Tensor:
        if std is None or self.held_out:
            return mean.float()
        return mean.float() + std.float() * rng.normal(tuple(mean.shape), purpose)

    def _condition(self, rng: SampleRNG, stored: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """A condition (C, F, h, w): as it is stored; or one of its variants for training, the clean one held out."""
        if name in stored:
            return stored[name].float()
        if self.held_out:
            return stored[f"{name}_clean_mean"].float()
        means, stds = stored[f"{name}_mean"], stored.get(f"{name}_std")
        variant = rng.choice(len(means), f"{name} variant")
        return self._posterior(rng, means[variant], None if stds is None else stds[variant], f"{name} posterior")


def prefetch(
    shards: ShardSet, places: Iterator[list[Slot]], collate: Collator, *, ahead: int, pin: bool
) -> Generator[Batch]:
    """Batches in the order of ``places``, made ahead of time by a few threads.

    An error of a batch is raised when its turn comes, not when it is read.

    Args:
        ahead: batches in the making; `bytes_ahead` says what they cost.
        pin: in page-locked memory, for an asynchronous copy to the GPU.
    """
    stop = Stop()

    def make(slots: list[Slot], fetching: Sequence[Future[None]]) -> Batch:
        for fetch in fetching:
            if not fetch.cancel():  # it has begun
                fetch.exception()  # which the read below meets, too
        batch = collate([read_sample(shards, slot.sample, stop) for slot in slots], slots)
        return batch.pin() if pin else batch

    pool, fetchers = Readers(READERS, "cogtrain-reader"), Readers(READERS, "cogtrain-fetcher")
    waiting: deque[Future[Batch]] = deque()
    try:
        for slots, fetching in _fetched_ahead(shards, places, fetchers, stop):
            waiting.append(pool.submit(make, slots, fetching))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stop.set()
        for readers in (pool, fetchers):
            readers.close()


def bytes_ahead(checkpoint: Checkpoint, bucket: Resolution, *, batch: int, pin: bool) -> int:
    """Host memory of the batches that `prefetch` holds ready, of the one in use and of those in the making, at most.

    Args:
        batch: samples of each.
        pin: as for `prefetch`; torch rounds what it locks up to a power of two.
    """
    family, config = checkpoint.family, checkpoint.transformer_config
    shape = family.latent(bucket)
    latent, text = 4 * math.prod(shape), 4 * config["max_text_seq_length"] * config["text_embed_dim"]
    image = 4 * math.prod(shape.still) if family.conditions else 0
    stored = [latent, latent, text] + (2 * _VARIANTS + 1) * [image]  # mean and deviation; fp32, the widest of all
    drawn = [size for size in (latent, 4 * math.prod(family.padded_latent(bucket)), text, image) if size]
    held = sum(1 << (batch * size - 1).bit_length() if pin else batch * size for size in drawn)
    # On CPUs a step takes longer than a batch: one thread makes the next, and the others keep what was small of theirs.
    making = sum((READERS if pin or size < LARGE else 1) * size for size in (*stored, *drawn))
    return (AHEAD + 1) * held + batch * making


def _fetched_ahead(
    shards: ShardSet, places: Iterator[list[Slot]], fetchers: Readers, stop: Stop
) -> Iterator[tuple[list[Slot], Sequence[Future[None]]]]:
    """The places, and what brings their samples into the cache, begun `_FETCHED` places before their turn."""
    coming: deque[tuple[list[Slot], Sequence[Future[None]]]] = deque()
    begun: dict[int, Future[None]] = {}  # by sample: in a small set one comes again before its turn
    for slots in places:
        if shards.cache is None:
            yield slots, ()
            continue
        for slot in slots:
            if slot.sample not in begun:
                begun[slot.sample] = fetchers.submit(shards.fetch_ahead, slot.sample, stop)
        coming.append((slots, [begun[slot.sample] for slot in slots]))
        if len(coming) > _FETCHED:
            first, fetching = coming.popleft()
            yield first, fetching
            for slot in first:
                begun.pop(slot.sample, None)
    yield from coming
