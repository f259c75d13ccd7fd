"""How planning grows with the number of clips: seconds and memory, up to a million of them.

``python -m workshop.million FOLDER --clips 1000000`` lays a data set in FOLDER, takes it through the functions that
``cogprep encode`` and ``cogtrain`` plan and open with, and prints a table, one row a stage, each stage a process of
its own. A million take a million inodes and 1 GB of FOLDER's disk, and about 15 minutes on two cores.

Real: the lists, their lines and captions of about 300 characters; a file for every line, each with its size and time;
`read_lists`, `scan`, `survey`, `make_plan`; the pool of processes; the survey cache; every record, written by
`record_bytes`; `open_shards` and the sampler. Made up: what a probe finds out (`pretend`; the files are holes without
a picture in them), and the tars, which are holes of the size that their record says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import DTYPES
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import SampleRow, ShardRecord, record_bytes, record_name, tar_name
from cogprep.dataset.probe import Probed
from cogprep.encode.part import check_and_hash, make_contract, survey_and_plan, survey_cache
from cogprep.encode.pipeline import planned_row
from cogprep.plan.folder import scan, split_folder
from cogprep.plan.plan import EncodePlan, PlannedShard
from cogprep.plan.probe_cache import SurveyCache
from cogprep.plan.slice import Slice
from cogprep.processes.pool import Pool
from cogprep.settings.encode import EncodeSettings
from cogprep.source.clip import ClipFault, Hashed

SIZE = "17x64x96"
SAMPLE_BYTES = 6_000_000  # of a 5B's 49x480x720
WORDS = (
    "a the wide slow camera follows red boat river morning light hills water birds crowd street rain neon woman "
    "walks past window dog runs grass field wind cloth smoke glass hands wood table close shot soft shadow turning"
)


@dataclass(frozen=True)
class Trial:
    """A data set that is laid in a folder, and the settings to encode it with."""

    folder: Path
    clips: int
    shard_samples: int

    @property
    def settings(self) -> EncodeSettings:
        return EncodeSettings(
            data_root=self.folder / "ds",
            resolution=[SIZE],
            out=self.folder / "out",
            model="tiny",
            shard_samples=self.shard_samples,
        )

    def opened(self) -> tuple[EncodeSettings, Checkpoint, Contract]:
        settings = self.settings
        checkpoint = settings.open_model()
        return settings, checkpoint, make_contract(settings, checkpoint, DTYPES["fp32"], check_and_hash(checkpoint))


def lay(trial: Trial, changed: int = 0) -> None:
    """Lists and files.

    Args:
        changed: of so many lines one says something else than before, and the next one is left out; 0: none.
    """
    root = trial.folder / "ds"
    draw, words = random.Random(0), WORDS.split()
    prompts, videos = [], []
    for index in range(trial.clips):
        name = f"videos/{index // 10_000:03d}/{index:07d}.mp4"
        caption = " ".join(draw.choices(words, k=54))
        if not changed:
            if index % 10_000 == 0:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(root / name, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(descriptor, 1_000_000 + index)
            os.close(descriptor)
        elif index % changed == 1:
            continue
        elif index % changed == 0:
            caption = f"another {caption}"
        prompts.append(f"{caption}\n")
        videos.append(f"{name}\n")
    (root / "prompts.txt").write_text("".join(prompts))
    (root / "videos.txt").write_text("".join(videos))


def pretend(paths: Sequence[Path]) -> list[Probed | ClipFault]:
    """What a probe would find out, without a look inside."""
    return [
        Probed(
            Hashed(info.st_size, info.st_mtime_ns, hashlib.sha256(path.name.encode()).digest()), Resolution.parse(SIZE)
        )
        for path in paths
        for info in [path.stat()]
    ]


def nothing() -> None:
    """For a bar that is not there."""


def cache_of(settings: EncodeSettings, checkpoint: Checkpoint) -> SurveyCache:
    return survey_cache(settings, checkpoint, Slice(1, 1, "default"))


def probe(trial: Trial) -> str:
    """Hand out every clip to two processes, and keep what they say."""
    settings, checkpoint, _ = trial.opened()
    settings.out.mkdir(exist_ok=True)
    sources = dict.fromkeys(sample.source for sample in settings.read_lists("t2v").trusted().samples)
    with Pool(2) as pool:
        found = cache_of(settings, checkpoint).find(sources.keys(), sources, pretend, pool, nothing)
    return f"{len(found)} clips"


def lists(trial: Trial) -> str:
    """Read and pair the lists."""
    return f"{len(trial.settings.read_lists('t2v').trusted().samples)} lines"


def planned(trial: Trial) -> tuple[EncodePlan, Contract]:
    """As `encode` plans, from the lists to the shards."""
    settings, checkpoint, contract = trial.opened()
    data = settings.read_lists("t2v").trusted()
    committed = scan(settings.out)
    with Pool(2) as pool:
        _, plan = survey_and_plan(settings, data, contract, committed, pool, cache_of(settings, checkpoint))
    return plan, contract


def plan(trial: Trial) -> str:
    """See `planned`."""
    made, _ = planned(trial)
    told = f"{made.new} new in {len(made.shards)} shards, {made.reused} reused, {made.dropped} dropped"
    assert not made.rejected, made.rejected[:3]
    return told


def commit_half(trial: Trial) -> str:
    """Records of every other planned shard, as a run that several workers share leaves them."""
    return commit(trial, 2)


def commit_all(trial: Trial) -> str:
    """Records of all that is left."""
    return commit(trial, 1)


def commit(trial: Trial, every: int) -> str:
    made, contract = planned(trial)
    for shard in made.shards[::every]:
        folder = split_folder(trial.settings.out, shard.split)
        size = len(shard.samples) * SAMPLE_BYTES + 10240
        digest = hashlib.sha256(f"{shard.number}".encode()).hexdigest()
        record = ShardRecord.of(shard.number, (size, digest), contract, [*rows(shard)])
        tar = folder / tar_name(shard.number)
        with tar.open("wb") as stream:
            stream.truncate(size)
        (folder / record_name(shard.number)).write_bytes(record_bytes(record))
    return f"{len(made.shards[::every])} records"


def rows(shard: PlannedShard) -> Iterator[SampleRow]:
    """As the encode fills them in."""
    for index, one in enumerate(shard.samples):
        at = index * SAMPLE_BYTES
        yield replace(
            planned_row(one),
            offset=at,
            size=SAMPLE_BYTES,
            json_offset=at + 512,
            json_size=700,
            tensors_offset=at + 2048,
            tensors_size=SAMPLE_BYTES - 4096,
            sha256=hashlib.sha256(one.key.encode()).digest(),
            caption_tokens=60,
            frames=list(range(0, 98, 2)),
            effective_fps=8.0,
            crop_box=[0, 0, 1920, 1080],
            colour="bt709 limited (tagged)",
        )


def change(trial: Trial) -> str:
    """One line in a hundred says something else, one in a hundred is gone; the cache is gone, too."""
    settings, checkpoint, _ = trial.opened()
    cache_of(settings, checkpoint).discard()
    lay(trial, changed=100)
    return "1% of the captions, 1% of the lines"


def train(trial: Trial) -> str:
    """Open every record as `cogtrain` does, draw the order of two epochs, and look up the samples of 50 steps."""
    from cogtrain.data.sampler import Sampler
    from cogtrain.data.shards import open_shards

    times = [time.perf_counter()]
    shards = open_shards([str(trial.settings.out / "*.tar")])
    times.append(time.perf_counter())
    identity = shards.fingerprint[:8]
    times.append(time.perf_counter())
    sampler = Sampler(shards.shard_of, shards.bucket_of, 64, 0)
    steps = len(sampler.epoch(0)), len(sampler.epoch(1))
    times.append(time.perf_counter())
    extents = [shards.extent(int(index)) for index in sampler.epoch(0)[:50].ravel()]
    times.append(time.perf_counter())
    opened, known, ordered, drawn = (after - before for before, after in itertools.pairwise(times))
    return (
        f"{len(shards)} samples ({identity}) of {len(shards.shards)} shards in {opened:.1f} s, their identity "
        f"in {known:.1f} s, two epochs of {steps[0]} steps in {ordered:.2f} s, {1e6 * drawn / len(extents):.0f} us each"
    )


STAGES: dict[str, Callable[[Trial], str]] = {
    "lists": lists,
    "probe": probe,
    "plan, from the survey cache": plan,
    "commit every other shard": commit_half,
    "plan, half committed": plan,
    "commit the rest": commit_all,
    "plan, all committed": plan,
    "change": change,
    "plan, 2% changed": plan,
    "train": train,
}


def peak_mib() -> int:
    """The most memory that this program held since it began; rusage's figure would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def measured(name: str, trial: Trial) -> dict[str, Any]:
    """A stage in this process: what it says, its seconds, and the most memory that the process held."""
    held = peak_mib()
    started, cpu = time.perf_counter(), time.process_time()
    said = STAGES[name](trial)
    return {
        "clips": trial.clips,
        "stage": name,
        "wall_s": round(time.perf_counter() - started, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "before_mib": held,
        "peak_mib": peak_mib(),
        "said": said,
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Where to lay the data set.")],
    clips: Annotated[int, typer.Option(min=200, help="How many clips.")] = 10_000,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 50,
) -> None:
    """Measure planning. Started again on the same folder, it goes on behind the last stage that it has done."""
    trial = Trial(folder, clips, shard_samples)
    results = folder / "results.jsonl"
    if not results.exists():
        (folder / "ds").mkdir(parents=True, exist_ok=True)
        lay(trial)
        results.touch()
    for name in list(STAGES)[len(results.read_text().splitlines()) :]:
        with ProcessPoolExecutor(1, get_context("spawn")) as one:
            result = one.submit(measured, name, trial).result()
        with results.open("a") as stream:
            stream.write(json.dumps(result) + "\n")
        told = f"{result['cpu_s']:8.1f} CPU s {result['wall_s']:8.1f} s {result['peak_mib']:6d} MiB  {result['said']}"
        typer.echo(f"{name:28} {told}")


if __name__ == "__main__":
    typer.run(main)
