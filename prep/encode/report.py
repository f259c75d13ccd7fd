"""What `encode` did: ``report.json``, and the summary that ends the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table

from cogcommon.cli.names import json_text, tars_in
from cogcommon.cli.terminal import Console, styled
from cogcommon.files.atomic import commit_bytes
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.store.address import as_shown
from cogcommon.store.store import FAULTS
from cogcommon.words import counted, in_words

from ..plan.folder import SPLITS, shard_label, split_folder
from ..plan.plan import EncodePlan, Rejected
from ..plan.slice import Slice
from ..plan.survey import Survey
from ..processes.pool import default_workers
from ..settings.encode import EncodeSettings
from ..source.clip import TONED
from ..store.committed import committed_shards
from ..store.locks import shard_disk_errors
from ..store.outlet import put_beside
from ..store.proof import refuse_foreign
from .outcome import NodeWork, Outcome

_SHOWN = 20  # rejected clips that the summary lists; the report has them all

Bound = Literal["decode", "vae", "disk", "nothing"]


@dataclass(frozen=True)
class Rejection:
    """A sample that could not be encoded: where the lists name it, and why; what is about its picture names that."""

    line: int
    source: str
    caption: str
    reason: str

    @classmethod
    def of(cls, rejected: Rejected) -> Rejection:
        sample, about, reason = rejected.sample, "image: ", rejected.reason
        if sample.image and reason.startswith(about):
            reason = f"image {sample.image}: {reason.removeprefix(about)}"
        return cls(sample.line, sample.source, sample.caption, reason)


@dataclass(frozen=True)
class Report:
    """Counts are samples; ``seconds`` is by stage. What is not of this worker's slice is not counted."""

    encoded: int
    pictures: int  # of those encoded, clips of one frame
    recovered: int
    reused: int
    rejected: int
    dropped: int
    kept: int  # their lines are there, their clips cannot be read now; what was encoded of them stays
    postponed: int  # left out of the records, for the next run to try again
    rejections: Sequence[Rejection]
    kept_samples: Sequence[Rejection]
    postponed_samples: Sequence[Rejection]
    seconds: dict[str, float]
    clips_per_minute: float
    bound_by: Bound
    advice: str
    tiled: int
    tone_mapped: int  # HDR clips, made SDR
    captions_truncated: int
    profiles_unused: (
        int  # pictures and first frames whose colours were taken for sRGB, since their profile cannot be applied
    )
    worker: str
    busy: Sequence[str]  # shards that another process writes
    unfinished: Sequence[str]  # planned shards that have no record yet
    unfinished_slices: Sequence[str]  # the slices, as --worker takes them, that these belong to
    usable: bool  # whether the folder holds, or will hold, any sample
    out: str
    validation: bool  # whether OUT/val holds shards
    data_root: str
    store_faults: str  # what failed to be read or written at an address, and was made good by further attempts
    model: str
    device: str
    gpu_busy: float | None  # share of the encode that the GPU worked, by its own clock; None on a CPU
    vae_encoder: str  # fused, or diffusers
    vae_difference: float | None  # of the fused encoder from diffusers' on a trial clip, relative
    nodes: Sequence[NodeWork]  # of a cluster

    def write(self, out: Path) -> Path:
        """Write report.json, or report-I-of-N.json for a slice of a divided run."""
        index, _, count = self.worker.partition("/")
        path = out / self.name_of(Slice(int(index), int(count), ""))
        if put_beside(out, path.name, self.to_json().encode()):
            return path
        with shard_disk_errors(path):
            refuse_foreign(path)
            commit_bytes(path, self.to_json().encode())
        return path

    @property
    def trouble(self) -> str:
        """What `--strict` objects to, in words; empty without any."""
        counts = {
            "rejected": self.rejected,
            "left for the next run": self.postponed,
            "kept, though it cannot be read now": self.kept,
        }
        return "; ".join(f"{counted(count, 'clip')} {what}" for what, count in counts.items() if count)

    @staticmethod
    def name_of(part: Slice) -> str:
        return "report.json" if part.count == 1 else f"report-{part.index}-of-{part.count}.json"

    def to_json(self) -> str:
        return json_text(dataclasses.asdict(self))


def make_report(
    settings: EncodeSettings,
    checkpoint: Checkpoint,
    part: Slice,
    found: Survey,
    plan: EncodePlan,
    outcome: Outcome,
    dropped: int,
    seconds: dict[str, float],
    device: str,
) -> Report:
    """Put together what every stage found out."""
    unusable = [*found.rejected, *plan.rejected, *outcome.rejected, *outcome.postponed]
    rejected = _by_line(one for one in unusable if not one.passing)
    postponed = _by_line(one for one in unusable if one.passing)
    kept = _by_line(one.line for one in found.kept if one.status == "ok")
    bound = what_bound(outcome.decode_wait_s, outcome.vae_s, outcome.write_wait_s)
    encode_s = seconds.get("encode", 0.0) - outcome.warm_up_s
    if outcome.warm_up_s:
        seconds = {**seconds, "encode": encode_s, "warm_up": outcome.warm_up_s}
    committed = {split: set(committed_shards(split_folder(settings.out, split))) for split in SPLITS}
    busy = set(outcome.busy)
    missing = [
        shard
        for shard in plan.shards
        if (shard.split, shard.number) in busy or shard.number not in committed[shard.split]
    ]
    waits = {"decode_wait": outcome.decode_wait_s, "vae": outcome.vae_s, "write_wait": outcome.write_wait_s}
    reused = plan.reused + outcome.elsewhere
    return Report(
        encoded=outcome.encoded,
        pictures=outcome.pictures,
        recovered=outcome.recovered,
        reused=reused,
        rejected=len(rejected),
        dropped=dropped,
        kept=len(kept),
        postponed=len(postponed),
        rejections=rejected,
        kept_samples=kept,
        postponed_samples=postponed,
        seconds={name: round(value, 3) for name, value in {**seconds, **waits}.items()},
        clips_per_minute=round(60 * outcome.encoded / encode_s, 2) if encode_s else 0.0,
        bound_by=bound,
        advice=advice_for(bound, settings.workers or default_workers(), default_workers(), device),
        tiled=outcome.tiled,
        tone_mapped=outcome.tone_mapped,
        captions_truncated=outcome.truncated,
        profiles_unused=outcome.profiles_unused,
        worker=str(part),
        busy=[shard_label(split, number) for split, number in outcome.busy],
        unfinished=[shard_label(shard.split, shard.number) for shard in missing],
        unfinished_slices=[
            f"{index}/{part.count}" for index in sorted({part.index_of(shard.number) for shard in missing})
        ],
        usable=bool(reused or kept or outcome.encoded or outcome.recovered or outcome.busy or part.count > 1),
        out=str(settings.out),
        validation=any((settings.out / "val").glob("*.parquet")),
        data_root=as_shown(settings.root),
        store_faults=str(FAULTS),
        model=checkpoint.name,
        device=device,
        gpu_busy=None if outcome.gpu.share is None else round(outcome.gpu.share, 4),
        vae_encoder=outcome.encoder.encoder,
        vae_difference=outcome.encoder.difference,
        nodes=outcome.nodes,
    )


def _by_line(samples: Iterable[Rejected]) -> list[Rejection]:
    return [Rejection.of(one) for one in sorted(samples, key=lambda one: one.sample.line)]


def what_bound(decode_wait_s: float, vae_s: float, write_wait_s: float) -> Bound:
    """Which side the run waited for most."""
    sides: dict[Bound, float] = {"decode": decode_wait_s, "vae": vae_s, "disk": write_wait_s}
    most = max(sides, key=lambda side: sides[side])
    return most if sides[most] > 0 else "nothing"


def advice_for(bound: Bound, workers: int, cores: int, device: str) -> str:
    """What would make the next run faster."""
    if bound == "decode":
        if workers < cores:
            return f"the VAE waited for clips: --workers {cores} uses every core"
        return "the VAE waited for clips: more cores, or clips of a smaller size, would help"
    if bound == "vae":
        return "the VAE was busy throughout" + (": a GPU would help" if device == "cpu" else ": more GPUs would help")
    if bound == "disk":
        return "the VAE waited for the disk: a faster disk for --out would help"
    return ""


def show(report: Report, console: Console, report_path: str) -> None:
    """The summary, readable in 80 columns.

    Args:
        report_path: as messages name it.
    """
    _show_samples(f"{counted(report.rejected, 'clip')} rejected", report.rejections, console, report_path)
    _show_samples(
        f"{counted(report.postponed, 'clip')} left for the next run, which tries again",
        report.postponed_samples, console, report_path,
    )  # fmt: skip
    _show_samples(
        f"{counted(report.kept, 'sample')} kept as encoded before: in the lists, but not to be read now",
        report.kept_samples, console, report_path,
    )  # fmt: skip
    pictures = f" ({counted(report.pictures, 'picture')} among them)" if report.pictures else ""
    parts = [f"encoded {report.encoded}{pictures}"]
    for name, count in {
        "recovered": report.recovered, "reused": report.reused, "kept": report.kept, "rejected": report.rejected,
        "left for the next run": report.postponed, "dropped": report.dropped,
    }.items():  # fmt: skip
        if count:
            parts.append(f"{name} {count}")
    console.print(styled((", ".join(parts), "bold"), f" in {in_words(report.seconds['total'])}"))
    if report.encoded:
        within = in_words(report.seconds["encode"])
        console.print(f"{report.clips_per_minute:.1f} clips/min in the {within} of encoding alone; {report.advice}")
    for node in report.nodes:
        console.print(
            f"{node.name}: {counted(node.clips, 'clip')}, {node.clips_per_minute:.1f} a minute, {node.waits_for}"
        )
    if report.gpu_busy is not None:
        warm_up = in_words(report.seconds.get("warm_up", 0.0))
        console.print(f"the GPU was busy {report.gpu_busy:.0%} of that time, after {warm_up} of warm-up")
    if report.captions_truncated:
        console.print(
            f"{counted(report.captions_truncated, 'caption')} cut at the length that the model reads; "
            "`cogprep validate` shows where",
        )
    if report.profiles_unused:
        console.print(
            f"{counted(report.profiles_unused, 'picture')} of a colour profile that cannot be applied, taken for "
            "sRGB; `cogprep validate` shows which",
        )
    if report.tone_mapped:
        console.print(f"{counted(report.tone_mapped, 'HDR clip')} {TONED}; `cogprep preview` shows how they look")
    if report.tiled:
        console.print(f"memory was short: the VAE ran in tiles for {counted(report.tiled, 'clip')}")
    if report.store_faults:
        console.print(report.store_faults)
    if report.busy:
        console.print(f"another process is writing {', '.join(report.busy)}; left to it")
    if report.unfinished:
        shown = ", ".join(report.unfinished[:4]) + (" ..." if len(report.unfinished) > 4 else "")
        if report.worker == "1/1":
            console.print(f"not finished yet: {shown}; run the same command again")
        else:
            slices = ", ".join(report.unfinished_slices[:16]) + (" ..." if len(report.unfinished_slices) > 16 else "")
            console.print(
                f"not finished yet: slices {slices} ({shown}); run them, or all of it without --worker",
            )
    shards = f"shards in {report.out}, " if report.usable else ""
    console.print(f"{shards}details in {report_path}", soft_wrap=True)
    left_out = report.rejected + report.postponed
    if left_out and report.usable and report.worker == "1/1":
        lines = left_out + report.encoded + report.recovered + report.reused + report.kept
        console.print(
            styled((f"{left_out} of {counted(lines, 'clip')} {'is' if left_out == 1 else 'are'} not in these shards",
                    "bold yellow"), ": the reasons are above, and `cogprep validate` says what to do about each")
        )  # fmt: skip
    if report.usable and not report.unfinished:
        line = f"next: cogtrain lora --shards {tars_in(report.out)}"
        if report.validation:
            line += f" --validate-shards {tars_in(f'{report.out}/val')}"
        console.print(line, soft_wrap=True)


def _show_samples(title: str, samples: Sequence[Rejection], console: Console, report_path: str) -> None:
    if not samples:
        return
    table = Table(title=title, title_justify="left", title_style="bold yellow", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("line", justify="right")
    table.add_column("clip", overflow="fold")
    table.add_column("reason", overflow="fold")
    for sample in samples[:_SHOWN]:
        table.add_row(str(sample.line), sample.source, sample.reason)
    if len(samples) > _SHOWN:
        table.add_row("", f"and {len(samples) - _SHOWN} more", report_path)
    console.print(table)
