"""`cogprep inspect`: what is in a folder of shards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from cogcommon.cli.names import json_text
from cogcommon.cli.terminal import Console, styled
from cogcommon.errors import ShardError
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import CONTRACT_FILE, Contract
from cogcommon.shards.records import SampleRow, read_record, read_table
from cogcommon.words import counted, in_bytes

from ..plan.folder import SPLITS, Split, read_contract, records_in, shard_label, split_folder
from ..plan.moved import named_now
from ..plan.origin import read_origin
from ..settings.shards import InspectSettings
from ..source.addresses import remote_address
from ..source.source_file import file_state
from ..store.committed import tars_without_record
from ..store.outlet import open_image

_ROWS = 5
_COLUMNS = [
    "status",
    "reason",
    "bucket",
    "size",
    "caption_truncated",
    "source_sha256",
]


@dataclass(frozen=True)
class InspectedSample:
    """A sample, as `inspect` shows a few of."""

    shard: str
    source: str
    bucket: str
    effective_fps: float
    caption: str


@dataclass(frozen=True)
class Contents:
    """Counts are samples unless they say otherwise; sizes are bytes."""

    out: str
    contract: Contract
    shards: Mapping[Split, int]
    samples: Mapping[Split, int]
    clips: int  # distinct by content
    buckets: Mapping[str, int]
    tar_bytes: int
    rejected: Mapping[str, int]  # by reason
    captions_truncated: int
    uncommitted: Sequence[str]  # tars without a record
    lost: Sequence[str]  # tars that have a record, and are gone
    rows: Sequence[InspectedSample]

    def to_json(self) -> str:
        return json_text(dataclasses.asdict(self))


def run(settings: InspectSettings) -> None:
    """The command."""
    with open_image(settings.out, "OUT") as image:
        contents = replace(inspect(image.folder), out=image.place)
    if settings.json:
        print(contents.to_json())
    else:
        show(contents, Console())


def inspect(out: Path) -> Contents:
    """Read every record of a folder, no tar.

    Raises:
        ShardError: no shards there, or a damaged record.
    """
    contract = read_contract(out)
    if contract is None:
        raise ShardError(
            "no shards here" if out.is_dir() else "there is no such folder",
            where=str(out / CONTRACT_FILE),
            fix="name the --out of `cogprep encode`",
        )
    shards: Counter[Split] = Counter()
    samples: Counter[Split] = Counter()
    buckets: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    clips: set[bytes] = set()
    first: list[tuple[str, SampleRow]] = []
    lost: list[str] = []
    tar_bytes = truncated = 0
    for split, number, path in records_in(out):
        header, table = read_table(path, _COLUMNS)
        tar_bytes += header.tar_size
        if not path.with_suffix(".tar").exists():
            lost.append(str(path.with_suffix(".tar").relative_to(out)))
        shards[split] += 1
        for row in table.to_pylist():
            if row["status"] != "ok":
                rejected[row["reason"]] += 1
                continue
            samples[split] += 1
            buckets[row["bucket"]] += 1
            clips.add(row["source_sha256"])
            truncated += row["caption_truncated"]
        if len(first) < _ROWS:
            whole = [row for row in read_record(path).rows if row.status == "ok"]
            first += [(shard_label(split, number), row) for row in whole[: _ROWS - len(first)]]
    uncommitted = [
        str(tar.relative_to(out)) for split in SPLITS for tar in tars_without_record(split_folder(out, split))
    ]
    return Contents(
        out=str(out),
        contract=contract,
        shards=dict(shards),
        samples=dict(samples),
        clips=len(clips),
        buckets=dict(buckets),
        tar_bytes=tar_bytes,
        rejected=dict(rejected),
        captions_truncated=truncated,
        uncommitted=uncommitted,
        lost=lost,
        rows=[
            InspectedSample(shard, row.source, row.bucket, row.effective_fps, row.caption)
            for (shard, _), row in zip(first, _named_now(out, contract, [row for _, row in first]), strict=True)
        ],
    )


def _named_now(out: Path, contract: Contract, rows: Sequence[SampleRow]) -> list[SampleRow]:
    """Samples with their clips' names of now. Only of clips that are not where they were is more asked than that.

    Behind an address it would be many requests; there all keep the names that they had.
    """
    origin = read_origin(out)
    if origin is None:
        return list(rows)
    paths = [(row, Path(origin.data_root) / row.source) for row in rows]
    away = [row for row, path in paths if remote_address(path) is None and file_state(path)[0] < 0]
    now = {row.key: row for row in named_now(origin, contract.task, away)}
    return [now.get(row.key, row) for row in rows]


def show(contents: Contents, console: Console) -> None:
    """For people, in 80 columns."""
    contract = contents.contract
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("model", f"{contract.model} ({contract.family}, {contract.task})")
    for split in SPLITS:
        if contents.shards.get(split):
            facts.add_row(
                split,
                f"{counted(contents.samples.get(split, 0), 'sample')} in {counted(contents.shards[split], 'shard')}",
            )
    facts.add_row("clips", f"{contents.clips:,} different")
    facts.add_row("buckets", ", ".join(f"{bucket}: {count}" for bucket, count in sorted(contents.buckets.items())))
    facts.add_row("size", in_bytes(contents.tar_bytes))
    stored = f"{contract.dtype}, posterior {contract.posterior}, text {contract.text_tokens}x{contract.text_dim}"
    if contract.image_variants:
        stored += f", {contract.image_variants} image variants"
    facts.add_row("stored", stored)
    facts.add_row("settings", ", ".join(_setting(name, value) for name, value in contract.settings.items()))
    facts.add_row("fingerprint", contract.fingerprint[:16])
    if contents.captions_truncated:
        facts.add_row("captions cut", str(contents.captions_truncated))
    console.print(facts)
    for reason, count in sorted(contents.rejected.items()):
        console.print(styled((f"rejected {count}", "yellow"), f": {reason}"))
    for name in contents.uncommitted:
        console.print(
            styled((f"{name} has no record", "yellow"), ": `cogprep encode` finishes it, `cogprep index` recovers it")
        )
    for name in contents.lost:
        console.print(styled((f"{name} is gone", "red"), ", and counted above: `cogprep encode` makes it anew"))
    if contents.rows:
        table = Table("shard", "clip", "bucket", "fps", "caption", box=None, padding=(0, 1))
        room = max(27, console.width - 53)
        for row in contents.rows:
            caption = row.caption if len(row.caption) <= room else row.caption[: room - 1] + "…"
            fps = "" if Resolution.parse(row.bucket).frames == 1 else f"{row.effective_fps:.2f}"
            table.add_row(row.shard, row.source, row.bucket, fps, caption)
        console.print(table)


def _setting(name: str, value: object) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"{name} {value if value != '' else 'none'}"
