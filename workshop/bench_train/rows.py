"""The rows of the benchmark, the most telling first, and the table they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cogcommon.model.families import BY_NAME, Resolution
from cogtrain.distributed.strategies import STRATEGIES
from cogtrain.settings.training import LoraSettings, TrainSettings

from .achieved import achieved_by
from .reference_guide import guide_rows

Kind = Literal["fast", "auto", "low", "file", "reference", "numerics"]

# Shape that goes through the same code in seconds on a CPU.
SMALL: Mapping[str, Any] = {
    "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 64, "text_embed_dim": 32,
    "sample_frames": 9, "sample_height": 8, "sample_width": 12,
}  # fmt: skip
SMALL_BUCKET = Resolution(9, 64, 96)


@dataclass(frozen=True)
class BenchRow:
    """One thing to measure: a family and a way to train it, a LoRA in bf16 or a row of the guide's table."""

    family: str
    kind: Kind
    rank: int | None = 128
    steps: int = 7
    number: int = 0  # in the guide's table
    processes: int = 1
    within_gib: float | None = None  # of GPU memory; as on a smaller card
    profile: bool = False  # two more steps, under torch's profiler
    memory_trace: bool = False  # one more step, with every allocation remembered
    link: float | None = None  # GB/s that copies between host and GPU are held to, in each direction
    small: bool = False
    layers: int | None = None  # of the transformer; as published by default
    resolution: str | None = None  # the family's native one by default
    compile: Literal["auto", "on", "off"] = "auto"

    @property
    def name(self) -> str:
        return f"{self.number:02d}/{self.kind}" if self.number else f"{self.family}/{self.kind}"

    @property
    def settings(self) -> TrainSettings:
        """As a user would give them."""
        if self.number:
            return guide_rows()[self.number].settings_for(self.kind)  # type: ignore[arg-type]
        memory = self.kind if self.kind in ("fast", "auto", "low") else "auto"
        return LoraSettings(rank=self.rank or 0, memory=memory, precision="bf16", strategy="ddp")  # type: ignore[arg-type]

    @property
    def shown(self) -> str:
        """Its name, on how many GPUs it runs where the row is about another number, and what its link is held to."""
        wanted = guide_rows()[self.number].processes if self.number else None
        name = f"{self.name} on {self.processes} of {wanted} GPUs" if (wanted or 1) > self.processes else self.name
        return name + (f" at {self.link:g} GB/s" if self.link else "")

    @property
    def copies_by_us(self) -> bool:
        """Whether all that it copies between host and GPU in a step can be held to a rate (`slower_link`)."""
        strategy = self.settings.strategy
        return self.kind not in ("reference", "numerics") and not (strategy != "auto" and STRATEGIES[strategy].offloads)

    def processes_of(self, here: int) -> int:
        """GPUs to run on, of those that are here; LoRAs of the default rows take one."""
        return min(guide_rows()[self.number].processes or here, here) if self.number else 1

    @property
    def on_host(self) -> bool:
        """Whether the host computes, too, and would be slowed by whatever is prepared there."""
        settings = self.settings
        small = settings.memory == "low" or self.within_gib is not None
        return (settings.strategy != "auto" and STRATEGIES[settings.strategy].offloads) or (self.rank is None and small)

    @property
    def command(self) -> str:
        """What a user types for the same."""
        if self.number:
            return guide_rows()[self.number].command(self.kind)  # type: ignore[arg-type]
        return f"cogtrain lora --memory {self.settings.memory} --precision bf16 --shards out/*.tar"

    @property
    def settling(self) -> int:
        """First steps that compile and allocate, and are not counted."""
        return 2 if self.steps > 5 else 1

    @property
    def bucket(self) -> Resolution:
        if self.resolution:
            return Resolution.parse(self.resolution)
        return SMALL_BUCKET if self.small else BY_NAME[self.family].native

    @property
    def shape(self) -> Mapping[str, Any]:
        return {**(SMALL if self.small else {}), **({"num_layers": self.layers} if self.layers else {})}


ROWS: tuple[BenchRow, ...] = (
    BenchRow("5b", "low", profile=True, memory_trace=True),
    BenchRow("5b", "fast", profile=True),
    BenchRow("5b", "reference"),
    BenchRow("5b", "auto", within_gib=22, memory_trace=True),
    BenchRow("2b", "fast"),
    BenchRow("2b", "reference"),
    BenchRow("2b", "low"),
    BenchRow("1.5-5b", "low", steps=4, memory_trace=True),
    BenchRow("1.5-5b", "fast", steps=4),
    BenchRow("1.5-5b", "reference", steps=3),
    BenchRow("5b-i2v", "auto"),
    BenchRow("5b", "numerics", steps=1),
    BenchRow("2b", "auto"),
    BenchRow("1.5-5b", "auto", steps=4, within_gib=32),
)


def guide_row(number: int, kind: Kind) -> BenchRow:
    """A row of the guide's table; what is measured of it needs fewer steps, each of which takes longer."""
    row = guide_rows()[number]
    rank = getattr(row.settings, "rank", None)
    large = row.family == "1.5-5b"
    return BenchRow(row.family, kind, rank=rank, steps=4 if large else 7, number=number)


def rows_named(words: Iterable[str]) -> list[BenchRow]:
    """Rows by name, as 5b/low; all kinds of a family (5b) or of a row of the guide's table (9 or 09).

    Raises:
        ValueError: there is no such row.
    """
    kinds: tuple[Kind, ...] = ("low", "auto", "file", "reference")
    there = [*ROWS, *(guide_row(number, kind) for number in guide_rows() for kind in kinds if _differs(number, kind))]
    found = []
    for word in words:
        name = re.sub(r"^(\d)(/|$)", r"0\1\2", word)
        named = [row for row in there if name in (row.name, row.name.split("/")[0])]
        if not named:
            raise ValueError(f"no row is called {word}; there are {' '.join(row.name for row in there)}")
        found += [row for row in named if row not in found]
    return found


def _differs(number: int, kind: Kind) -> bool:
    """The file itself is a kind of its own where another strategy is advised."""
    return kind != "file" or guide_rows()[number].processes == 1


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table; times relative to the reference's of the same family."""
    results = [result for result in results if "s_per_step" in result]
    against = {_compared(result): result for result in results if result["kind"] == "reference"}
    lines = [
        "| | s/step | TFLOP/s, of the card's | times the reference | losses off its | peak GiB | host GiB "
        "| forward / backward / optimizer s | compile s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ratio = off = ""
        if reference := against.get(_compared(result)):
            ratio = f"{reference['s_per_step'] / result['s_per_step']:.2f}"
            pairs = list(zip(result["losses"], reference["losses"], strict=False))
            off = f"{max(abs(mine / theirs - 1) for mine, theirs in pairs):.2%} in {len(pairs)} steps"
        parts = " / ".join(f"{result[part]:.2f}" for part in ("forward_s", "backward_s", "optimizer_s"))
        lines.append(
            f"| {_named(result)} | {result['s_per_step']:.2f} | {achieved_by(result) or ''} "
            f"| {ratio} | {off} | {max(result['peak_gib'], result['first_peak_gib']):.1f} "
            f"| {result['host_gib']:.1f} | {parts} | {result['compile_s']:.0f} |"
        )
    return "\n".join(lines)


def _compared(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return result["family"], result["number"], result["processes"], result["bucket"], result["layers"]


def _named(result: Mapping[str, Any]) -> str:
    rank = f" r{result['rank']}" if result["rank"] else ""
    layers = f" {result['layers']} layers" if result["layers"] else ""
    name = f"{result['family']}{rank} {result['bucket']}{layers}, {result['kind']}"
    if result["number"]:
        gpus = f" on {result['processes']} GPUs" if result["processes"] > 1 else ""
        name = f"{result['number']:02d}: {name}, {result['strategy']}{gpus}"
    if result["within_gib"]:
        name += f" within {result['within_gib']:g} GiB"
    if result.get("link"):
        name += f", copies at {result['link']:g} GB/s"
    return name + (", not compiled" if result["compile"] == "off" and result["kind"] != "reference" else "")
