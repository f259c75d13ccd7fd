"""What `validate` found out, as a page of 80 columns and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cogcommon.cli.names import json_text
from cogcommon.cli.terminal import Console, styled
from cogcommon.errors import DataRootError
from cogcommon.model.families import Resolution
from cogcommon.words import counted, in_bytes, in_words

from ..dataset.advice import Advice
from ..dataset.guesses import Guess

REFUSES = "encode would refuse"  # begins what a `Refusal` says
_SHOWN = 20  # faults that a terminal shows; a file or a pipe gets them all, and so does --json
_SHOWN_LINES = 3  # examples of one kind of advice


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """A fault, where the lists name it."""

    file: str
    line: int  # from 1; 0 for the list as a whole
    entry: str  # what the list says there
    what: str
    fix: str = ""  # what to type; empty where `what` says it, or a guess does for many lines at once
    where: str = ""  # more of it, in lines

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Uncaptioned(Finding):
    """A caption that is not written yet: one of many, as a rule, so the page names a few, after all other faults."""


@dataclass(frozen=True)
class Refusal(Finding):
    """What `encode` would object to: a fault of the output folder, not of the data."""


@dataclass(frozen=True)
class BucketPlan:
    """What `encode` would make of one bucket. Shares are of the source picture, 0 to 1."""

    resolution: Resolution
    clips: int
    source_frames: tuple[int, int]  # of its clips, least and most
    fps: tuple[float, float]  # effective, least and most
    loss: tuple[float, float]  # cut away, mean and most
    shards: int
    bytes: int
    gpu_s: float | None  # of the VAE on one card, the verdict's; None for a built-in model


@dataclass(frozen=True)
class Verdict:
    """Everything `validate` says of a data root."""

    data_root: str
    model: str
    family: str
    family_fps: int
    precision: str
    lines: int
    usable: int
    validation: int  # samples held out
    faults: Sequence[Finding]
    guesses: Sequence[Guess]
    advice: Sequence[Advice]
    plan: Sequence[BucketPlan]  # of a first encode; empty when the lists cannot be paired
    gpu: str | None  # the card of the plan's seconds; None for a built-in model
    encode: Mapping[str, int]  # samples that encode would make, reuse, keep and drop, in the folder as it is
    notes: Sequence[str]
    seconds: float

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        for bucket, row in zip(self.plan, values["plan"], strict=True):
            row["resolution"] = str(bucket.resolution)
        return json_text(values)


def show(verdict: Verdict, console: Console) -> None:
    """Print the page: faults, advice, plan."""
    checked = f"({verdict.family}, {verdict.family_fps} fps), checked in {in_words(verdict.seconds)}"
    console.print(
        styled(
            (verdict.data_root, "bold"), f": {counted(verdict.lines, 'clip')} for {verdict.model} ", (checked, "dim")
        )
    )
    if verdict.faults:
        _show_faults(verdict, console)
    else:
        console.print("\nno faults", style="bold green")
    for guess in verdict.guesses:
        console.print(styled("\n", ("probably", "bold yellow"), f": {guess.what}"))
        console.print(styled("  ", ("-> ", "dim"), guess.fix), soft_wrap=True)  # a command stays in one piece
    if verdict.advice:
        _show_advice(verdict, console)
    if verdict.plan:
        _show_plan(verdict, console)
    for note in verdict.notes:
        console.print(f"\n{note}", style="dim")


def _show_faults(verdict: Verdict, console: Console) -> None:
    console.print(f"\n{counted(len(verdict.faults), 'fault')}", style="bold red")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold", max_width=24)
    table.add_column(overflow="fold")
    in_lists = [fault for fault in verdict.faults if not isinstance(fault, Refusal)]
    blank: list[Finding] = [fault for fault in in_lists if isinstance(fault, Uncaptioned)]
    others = [fault for fault in in_lists if not isinstance(fault, Uncaptioned)]
    alike = {what: at for at, what in enumerate(dict.fromkeys(fault.what for fault in others))}
    others.sort(key=lambda fault: alike[fault.what])
    shown = others[:_SHOWN] + blank[:_SHOWN_LINES] if console.is_terminal else others + blank
    before = ""
    for fault in shown:
        table.add_row(fault.place, fault.entry, "the same" if fault.what == before else fault.what)
        before = fault.what
    if in_lists:
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
    if len(in_lists) > len(shown):
        console.print(f"  and {len(in_lists) - len(shown)} more; --json lists them all")
    for fix in dict.fromkeys(fault.fix for fault in in_lists if fault.fix):
        places = [fault.place for fault in in_lists if fault.fix == fix]
        more = f" and {len(places) - _SHOWN_LINES} more" if len(places) > _SHOWN_LINES else ""
        line = styled(("-> ", "dim"), (f"{', '.join(places[:_SHOWN_LINES])}{more}: ", "cyan"), fix)
        console.print(Padding(line, (0, 0, 0, 4), expand=False))
    for fault in verdict.faults:
        if isinstance(fault, Refusal):
            told = str(DataRootError(fault.what, where=fault.where or fault.place, fix=fault.fix))
            console.print("  " + told.replace("\n", "\n  "), soft_wrap=True)  # a command stays in one piece


def _show_advice(verdict: Verdict, console: Console) -> None:
    console.print(styled("\n", ("advice", "bold yellow"), (" (nothing here stops an encode)", "dim")))
    for advice in verdict.advice:
        count = f", {counted(len(advice.lines), 'clip')}" if advice.lines else ""
        line = styled((advice.kind, "yellow"), f"{count}: {advice.what}")
        console.print(Padding(line, (0, 0, 0, 2), expand=False))
        for text in _examples(advice):
            console.print(Padding(text, (0, 0, 0, 6), expand=False))
        if advice.fix:
            console.print(Padding(styled(("-> ", "dim"), advice.fix), (0, 0, 0, 4), expand=False))


def _examples(advice: Advice) -> Iterator[Text]:
    more = len(advice.lines) - _SHOWN_LINES
    if not any(detail for _, detail in advice.lines):  # lines alone fit on one
        numbers = ", ".join(str(line) for line, _ in advice.lines[: 4 * _SHOWN_LINES])
        more -= 3 * _SHOWN_LINES
        if advice.lines:
            yield styled((f"line{'s' if len(advice.lines) > 1 else ''} {numbers}", "dim"))
    else:
        for line, detail in advice.lines[:_SHOWN_LINES]:
            yield styled((f"line {line}", "dim"), f"  {detail}")
    if more > 0:
        yield styled((f"and {more} more", "dim"))


def _show_plan(verdict: Verdict, console: Console) -> None:
    held = f", {verdict.validation} of them held out for validation" if verdict.validation else ""
    trained = f"(trained at {verdict.family_fps} fps)"
    console.print(styled("\n", ("plan", "bold"), f": {counted(verdict.usable, 'clip')}{held} ", (trained, "dim")))
    timed = any(row.gpu_s is not None for row in verdict.plan)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("bucket", style="cyan", no_wrap=True)
    for name in ("clips", "frames", "fps", "cut", "shards", "size", *(["GPU time"] if timed else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in verdict.plan:
        table.add_row(
            str(row.resolution),
            str(row.clips),
            _range(row.source_frames, ".0f") if row.clips else "",
            _range(row.fps, ".3g") if row.clips and row.resolution.frames > 1 else "",
            f"{row.loss[0]:.0%}" if row.clips else "",
            str(row.shards),
            in_bytes(row.bytes) if row.clips else "",
            in_words(row.gpu_s) if row.clips and row.gpu_s is not None else "",
        )
    if len(verdict.plan) > 1:
        table.add_section()
        clips, shards = sum(row.clips for row in verdict.plan), sum(row.shards for row in verdict.plan)
        cells = ["all", str(clips), "", "", "", str(shards), in_bytes(sum(row.bytes for row in verdict.plan))]
        table.add_row(*cells, *([in_words(sum(row.gpu_s or 0.0 for row in verdict.plan))] if timed else []))
    console.print(table)
    console.print("frames: in a clip; fps: of those used; cut: cut off the picture, on average", style="dim")


def _range(ends: tuple[float, float], form: str) -> str:
    low, high = (format(end, form) for end in ends)
    return low if low == high else f"{low}-{high}"
