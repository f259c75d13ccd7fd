"""Encode planned shards: decode pool -> VAE -> writer, all three at once.

`Pipeline.encode` commits any shards of a plan; which worker takes which shards is
decided by its caller. Clips are decoded ahead, across shard borders, up to a bound;
the calling thread feeds the VAE, on a GPU one clip ahead; another thread hashes and
writes. Samples reach a shard in planned order, so the same plan gives the same bytes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cogcommon.cli.progress import say
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import SampleRow

from ..plan.completion import Writer, open_writer
from ..plan.folder import shard_label, split_folder
from ..plan.plan import PlannedSample, PlannedShard, Rejected
from ..source.clip import TONED, ClipFault
from ..source.remote import ahead
from ..store.locks import ShardBusy
from ..store.outlet import Outlet
from ..store.shards import ShardDone, ShardWriter
from ..vae.encoder import LatentEncoder, Pending
from ..video.decode import Clip
from .captions import TextStore
from .decoding import Decoding
from .outcome import Outcome
from .write_thread import WriteThread

AT_ONCE = 4  # shards on the disk of an outlet that keeps none: written, waiting, uploaded, and about to be
_IN_FLIGHT = 2  # clips on the GPU: one that it encodes, and the next, which it can begin at once


@dataclass(frozen=True)
class _Decode:
    writer: Writer
    planned: PlannedSample


@dataclass(frozen=True)
class _LeftBehind:
    writer: ShardWriter
    planned: PlannedSample


@dataclass(frozen=True)
class _SetAside:
    writer: Writer
    planned: PlannedSample
    reason: str


@dataclass(frozen=True)
class _Commit:
    writer: Writer
    shard: PlannedShard


_Step = _Decode | _LeftBehind | _SetAside | _Commit


@dataclass(frozen=True)
class Care:
    """How carefully shards are encoded; as it stands, as fast as it goes.

    Args:
        at_hand: called before each clip is read.
        one_at_a_time: each clip is read, encoded and handed to the disk before the next one is read, so that the one
            at hand is to blame for what happens.
        set_aside: samples, by key, that are not tried but left for another run, and why.
    """

    at_hand: Callable[[PlannedSample], None] = lambda _planned: None
    one_at_a_time: bool = False
    set_aside: Mapping[str, str] = field(default_factory=dict)


QUICKLY = Care()


class Pipeline:
    """Encodes shards of one contract on one device.

    Args:
        outlet: the output folder, which exists; and where shards go from there.
        contract: of every shard.
        decoding: of the clips.
        latents: the VAE.
        text: holds the embedding of every caption that will be asked for.
        outcome: counts and times are added to it.
        advance: called after each sample.
        care: see there.
    """

    def __init__(
        self,
        *,
        outlet: Outlet,
        contract: Contract,
        decoding: Decoding,
        latents: LatentEncoder,
        text: TextStore,
        outcome: Outcome,
        advance: Callable[[], None],
        care: Care = QUICKLY,
    ) -> None:
        self._outlet = outlet
        self._contract = contract
        self._decoding = decoding
        self._latents = latents
        self._text = text
        self._outcome = outcome
        self._advance = advance
        self._care = care
        self._open: list[Writer] = []
        self._flight: deque[tuple[Pending | None, Callable[[], None]]] = deque()  # in order, for the writer

    def encode(self, shards: Sequence[PlannedShard]) -> None:
        """Encode and commit shards; what came of them is added to the outcome.

        Raises:
            DiskError: the disk is full. What was committed stays good.
        """
        steps: deque[_Step] = deque()

        def samples() -> Iterator[PlannedSample]:
            for step in ahead(self._steps(shards), self._files):
                steps.append(step)
                if isinstance(step, _Decode):
                    self._care.at_hand(step.planned)
                    yield step.planned

        self._outcome.gpu.pause()
        try:
            with WriteThread(ahead=1) as self._publisher, WriteThread() as thread:
                window = 1 if self._care.one_at_a_time else self._decoding.window(shards)
                clips = self._decoding.clips(samples(), window)
                while True:
                    started = time.perf_counter()
                    clip = next(clips, None)
                    self._outcome.decode_wait_s += time.perf_counter() - started
                    while steps and not isinstance(step := steps[0], _Decode):
                        self._pass(steps.popleft())
                    if clip is None:
                        break
                    step = steps.popleft()
                    assert isinstance(step, _Decode)
                    self._encode_one(step, clip)
                    self._land(thread, 0 if self._care.one_at_a_time else _IN_FLIGHT)
                assert not steps
                self._land(thread, 0)
        finally:
            self._outcome.gpu.pause()
            self._flight.clear()
            for writer in self._open:
                writer.abandon()
            self._open.clear()

    def _steps(self, shards: Iterable[PlannedShard]) -> Iterator[_Step]:
        """What to do, in order. A shard is locked when its first clip is about to be decoded."""
        for shard in shards:
            try:
                folder = split_folder(self._outlet.folder, shard.split)
                folder.mkdir(parents=True, exist_ok=True)
                keys = {planned.key for planned in shard.samples}
                self._outlet.prepare(folder, shard.number, rewrite=shard.completes)
                writer = open_writer(folder, shard.number, self._contract, keys, completes=shard.completes)
            except ShardBusy:
                self._outcome.busy.append((shard.split, shard.number))
                continue
            except ShardDone:  # another process was first
                self._outcome.elsewhere += len(shard.samples)
                continue
            self._open.append(writer)
            left_behind = writer.left_behind() if isinstance(writer, ShardWriter) else set()
            for planned in shard.samples:
                if isinstance(writer, ShardWriter) and planned.key in left_behind:
                    yield _LeftBehind(writer, planned)
                elif reason := self._care.set_aside.get(planned.key):
                    yield _SetAside(writer, planned, reason)
                else:
                    yield _Decode(writer, planned)
            yield _Commit(writer, shard)

    def _files(self, step: _Step) -> list[Path]:
        """The files that a step will read."""
        return self._decoding.files(step.planned) if isinstance(step, _Decode) else []

    def _pass(self, step: _Step) -> None:
        """Queue a step that needs no clip."""
        if isinstance(step, _LeftBehind):
            left, row = step.writer, planned_row(step.planned)
            self._flight.append((None, lambda: left.add_left_behind(row)))
            self._outcome.recovered += 1
            self._advance()
        elif isinstance(step, _SetAside):
            self._postpone(step.writer, step.planned, step.reason)
        elif isinstance(step, _Commit):
            writer, shard = step.writer, step.shard
            self._flight.append((None, lambda: self._commit(writer, shard)))

    def _postpone(self, writer: Writer, planned: PlannedSample, reason: str) -> None:
        """Leave a sample for another run; its place is kept."""
        self._outcome.postponed.append(Rejected(planned.sample, reason, passing=True))
        self._flight.append((None, lambda: writer.postpone(planned.key)))
        self._advance()

    def _commit(self, writer: Writer, shard: PlannedShard) -> None:
        if writer.commit() is not None:
            self._publisher.submit(lambda: self._publish(writer.folder, shard))
        self._open.remove(writer)

    def _publish(self, folder: Path, shard: PlannedShard) -> None:
        try:
            self._outlet.publish(folder, shard.number)
        except ShardDone:
            say(f"{shard_label(shard.split, shard.number)}: another writer committed it first, so that one counts")
        except ShardBusy:
            self._outcome.busy.append((shard.split, shard.number))

    def _encode_one(self, step: _Decode, clip: Clip | ClipFault) -> None:
        writer, row = step.writer, planned_row(step.planned)
        if isinstance(clip, ClipFault) and clip.passing:
            self._postpone(writer, step.planned, clip.reason)
            return
        if isinstance(clip, ClipFault):
            self._outcome.rejected.append(Rejected(step.planned.sample, clip.reason))
            rejected = replace(row, status="rejected", reason=clip.reason)
            self._flight.append((None, lambda: writer.add_rejected(rejected)))
            self._advance()
            return
        image = None
        if self._contract.task == "i2v":
            image = clip.frames_FHWC[0] if clip.image_HWC is None else clip.image_HWC
        started = time.perf_counter()
        pending = self._latents.start(row.key, clip.frames_FHWC, image)
        self._outcome.vae_s += time.perf_counter() - started - pending.warm_up_s
        self._outcome.warm_up_s += pending.warm_up_s
        row = replace(
            row,
            frames=list(clip.indices),
            effective_fps=clip.effective_fps,
            crop_box=list(clip.crop_box),
            colour=clip.colour,
            tiled=pending.tiled,
        )
        self._outcome.encoded += 1
        self._outcome.pictures += step.planned.bucket.frames == 1
        self._outcome.tiled += pending.tiled
        self._outcome.profiles_unused += bool(clip.profile_fault)
        self._outcome.tone_mapped += TONED in clip.colour
        self._flight.append((pending, lambda: self._write(writer, row, pending)))

    def _land(self, thread: WriteThread, still: int) -> None:
        """Hand finished clips to the writer, in order; wait until at most ``still`` clips are on the GPU."""
        while self._flight:
            pending, task = self._flight[0]
            busy = sum(other is not None and not other.done for other, _ in self._flight)
            if pending is not None and not pending.done and busy <= still:
                return
            self._flight.popleft()
            started = time.perf_counter()
            if pending is not None:
                pending.wait()
                self._outcome.gpu.add(pending.span)
            landed = time.perf_counter()
            thread.submit(task)
            self._outcome.vae_s += landed - started
            self._outcome.write_wait_s += time.perf_counter() - landed
            if pending is not None:
                self._advance()

    def _write(self, writer: Writer, row: SampleRow, pending: Pending) -> None:
        latents = pending.latents()
        text_LD, facts = self._text.read(row.caption)
        self._outcome.truncated += facts.truncated
        row = replace(row, caption_tokens=facts.tokens, caption_truncated=facts.truncated)
        writer.add(row, {**latents.tensors, "text": text_LD})


def planned_row(planned: PlannedSample) -> SampleRow:
    """A sample's row as far as the plan knows it."""
    return SampleRow(
        key=planned.key,
        status="ok",
        bucket=str(planned.bucket),
        caption=planned.sample.caption,
        caption_tokens=0,
        caption_truncated=False,
        source=planned.sample.source,
        source_line=planned.sample.line,
        source_size=planned.clip.size,
        source_mtime_ns=planned.clip.mtime_ns,
        source_sha256=planned.clip.sha256,
        image=planned.sample.image,
        image_sha256=planned.image_sha256,
        frames=[],
        effective_fps=0.0,
        crop_box=[],
        colour="",
        tiled=False,
    )
