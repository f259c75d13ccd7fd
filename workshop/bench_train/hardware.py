"""The README's tables of the guide's rows and of what was measured; the rest of them is computed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import BY_NAME, Resolution
from cogcommon.words import GIB
from cogtrain.blocks.plan import BlockPlan
from cogtrain.data.shard_set import ShardSet
from cogtrain.distributed.strategies import STRATEGIES
from cogtrain.memory.estimate import Estimate, estimate
from cogtrain.memory.measured import REFERENCE, SAME, Measured, everything_measured, measured
from cogtrain.memory.seconds import H200, seconds, speed_of
from cogtrain.runs.run import Run
from cogtrain.settings.training import LoraSettings, SftSettings, TrainSettings

from .achieved import achieved
from .reference_guide import GuideRow, Way, guide_rows
from .subject import random_checkpoint, random_run, random_shards

_CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 141)  # GB that cards are sold with
_COMPUTED_FOR = 80  # GB of the card on which --memory auto is shown


def guide_table() -> str:
    """The guide's rows, as Markdown. **Bold** is measured."""
    lines = [
        f"| | model and method | GPUs | guide | plain loop | `auto` on {_COMPUTED_FOR} GB | `low` | its host memory "
        "| smallest card |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in guide_rows().values():
        low = _estimate(row, "low")
        lines.append(
            f"| {row.number} | {_shown(row)} | {row.gpus} | {row.guide_gb} GB | {_cell(row, 'reference')} "
            f"| {_cell(row, 'auto')} | {_cell(row, 'low')} | {low.host * row.gpus / GIB:.0f} GB "
            f"| {_smallest(row)} |"
        )
    return "\n".join(lines)


def beside_table() -> str:
    """Where a plain loop was measured: the fastest of them beside our fastest and our smallest run, as Markdown."""
    lines = ["| | GPUs | plain loop | cogtrain, fastest | cogtrain, smallest |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str, str, int], list[Measured]] = {}
    for run in reversed(measured()):
        if run.resolution == _native(run.family):
            spread = "" if run.gpus == 1 or run.strategy == "ddp" else f", {run.strategy}"
            groups.setdefault((run.family, run.method, spread, run.gpus), []).append(run)
    for (family, method, spread, gpus), runs in sorted(groups.items(), key=lambda group: (group[0][3], group[0][1])):
        plain = [run for run in runs if run.memory == REFERENCE]
        ours = [run for run in runs if run.memory != REFERENCE]
        if plain and ours:
            fastest = min(ours, key=lambda run: (run.faster_since, run.s_per_step))
            smallest = min(ours, key=lambda run: (round(run.peak_gib, 1), run.faster_since, run.s_per_step))
            name = f"{family.upper()} {'LoRA' if method == 'lora' else 'all weights'}{spread}"
            cells = [_took(min(plain, key=lambda run: run.s_per_step)), _took(fastest)]
            cells.append(_took(smallest) if smallest.peak_gib < 0.95 * fastest.peak_gib else "")
            lines.append(f"| {name} | {gpus} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _took(run: Measured) -> str:
    how = ", offloaded" if STRATEGIES[run.strategy].offloads else ""
    how += ", FlashAttention 4" if run.attention == "flash4" else ""
    took = "" if run.faster_since else f"{run.s_per_step:.2f} s ({achieved(run).words}), "
    return f"{took}{run.peak_gib:.1f} GB{how}"


def measured_table() -> str:
    """Every run that was measured, the newest of its kind, beside what was computed for it, as Markdown."""
    lines = [
        "| run | GPUs | s/step | TFLOP/s, of the card's | peak | computed | host memory | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    newest: dict[tuple[object, ...], Measured] = {}
    for run in measured():
        how = json.dumps(run.block_plan)
        newest.setdefault((run.row, how, run.attention, run.gpu, run.gpus, run.resolution), run)
    for run in sorted(newest.values(), key=lambda run: (run.row, run.gpus, run.memory == REFERENCE)):
        off = ""
        if run.memory != REFERENCE:
            needs, takes = computed_for(run)
            off = f"{needs.peak / GIB:.1f} GB ({needs.peak / GIB / run.peak_gib - 1:+.0%})"
            off += f", {takes:.2f} s ({takes / run.s_per_step - 1:+.0%})" if takes else ""
        what = f"{run.family.upper()} {run.method.upper() if run.method == 'sft' else 'LoRA'}, {run.strategy}"
        what += "" if run.resolution == _native(run.family) else f", {run.resolution}"
        given = f", {run.card_gib:.0f} GB of it" if run.memory == "auto" else ""
        given += ", FlashAttention 4" if run.attention == "flash4" else ""
        host = "" if run.host_gib is None else f"{run.host_gib:.0f} GB"
        lines.append(
            f"| {what}, {run.memory} | {run.gpus} x {run.gpu}{given} | {run.s_per_step:.2f}"
            f"{', faster since' if run.faster_since else ''} | {achieved(run)} | {run.peak_gib:.1f} GB "
            f"| {off} | {host} | `{run.command}` |"
        )
    return "\n".join(lines)


def link_table() -> str:
    """What was measured with copies held to a slower link, beside the same over the machine's own, as Markdown."""
    lines = ["| run | GB/s | s/step | over its own link | peak | computed |", "|---|---|---|---|---|---|"]
    held = [run for run in reversed(everything_measured()) if run.link is not None]
    for run in sorted(held, key=lambda run: (run.row, -(run.link or 0))):
        same = (known for known in measured() if all(getattr(known, it) == getattr(run, it) for it in SAME))
        own = next((f"{known.s_per_step:.2f} s" for known in same if not known.faster_since), "")
        takes = computed_for(run)[1]
        off = f"{takes:.2f} s ({takes / run.s_per_step - 1:+.0%})" if takes else ""
        lines.append(
            f"| `{run.command}` | {run.link:g} | {run.s_per_step:.2f} ({achieved(run).words}) | {own} "
            f"| {run.peak_gib:.1f} GB | {off} |"
        )
    return "\n".join(lines)


def computed_for(measured: Measured) -> tuple[Estimate, float | None]:
    """What is predicted for a run of ours that was measured, under the plan that it had: bytes, and seconds."""
    assert measured.block_plan is not None, measured
    full = SftSettings(batch_size=measured.batch_size)
    settings = full if measured.method == "sft" else LoraSettings(batch_size=full.batch_size, rank=measured.rank or 0)
    run = replace(
        _run(measured.family, settings, measured.gpus, measured.resolution),
        strategy=measured.strategy,  # type: ignore[arg-type]
        precision=measured.precision,  # type: ignore[arg-type]
    )
    found = estimate(run, memory=measured.memory, card=int(measured.card_gib * GIB))  # type: ignore[arg-type]
    found = replace(found, plan=BlockPlan.of_fields(measured.block_plan))
    speed = speed_of(measured.gpu)
    if speed and measured.link:
        speed = replace(speed, link=measured.link * 1e9)
    return found, seconds(run, found, speed, measured.attention) if speed else None  # type: ignore[arg-type]


def _shown(row: GuideRow) -> str:
    if row.method == "lora":
        return f"{row.family.upper()} LoRA"
    spread = {"ddp": "", "zero2-offload": ", offloaded"}.get(str(row.settings.strategy), f", {row.settings.strategy}")
    return f"{row.family.upper()} all weights{spread}"


def _cell(row: GuideRow, way: Way) -> str:
    """Memory, and seconds where they were measured, on as many GPUs as the row is about."""
    needs = _estimate(row, way)
    if run := _measured_as(row, way, needs):
        if run.faster_since:
            return f"**{run.peak_gib:.1f} GB**, {seconds(_run_of(row, way), needs, H200):.1f} s"
        return f"**{run.peak_gib:.1f} GB, {run.s_per_step:.2f} s** ({achieved(run).words})"
    if way == "reference":
        return ""
    return f"{needs.peak / GIB:.1f} GB, {seconds(_run_of(row, way), needs, H200):.1f} s"


def _measured_as(row: GuideRow, way: Way, needs: Estimate) -> Measured | None:
    """The newest run that was measured of a row, on as many GPUs, with the block plan that is meant here."""
    memory = {"reference": REFERENCE, "file": "auto"}.get(way, way)
    wanted = (row.family, row.method, needs.strategy, memory, row.settings.precision, row.gpus)
    for run in measured():
        same = (run.family, run.method, run.strategy, run.memory, run.precision, run.gpus) == wanted
        same = same and run.rank == getattr(row.settings, "rank", None) and run.resolution == _native(row.family)
        # On a larger card --memory auto means another plan.
        if same and (memory != "auto" or run.block_plan == needs.plan.fields()):
            return run
    return None


def takes(row: GuideRow) -> str:
    """What a row takes as its file is: memory and seconds, and what says so."""
    needs = _estimate(row, "file")
    if run := _measured_as(row, "file", needs):
        where = f"{run.gpus} {run.gpu}{'s' * (run.gpus > 1)}"
        second = f"{run.s_per_step:.2f} s a step ({achieved(run).words} of its peak)"
        return f"Takes {run.peak_gib:.1f} GB of each GPU and {second}: measured on {where}."
    host = round(needs.host * row.gpus / GIB)
    took = seconds(_run_of(row, "file"), needs, H200)
    took_s = f", {took:.1f} s a step at an H200's speed" if took else ""
    of_host = f" and {host} GB of host memory{' in all' * (row.gpus > 1)}" if host else ""
    return (
        f"Takes {needs.peak / GIB:.1f} GB of each GPU of {_COMPUTED_FOR} GB{of_host}{took_s}: "
        "computed, as by cogtrain plan."
    )


def config_files() -> dict[str, str]:
    """The files of ``configs/``, by their path from the repository's root."""
    return {row.file: row.toml(takes(row)) for row in guide_rows().values()}


def _estimate(row: GuideRow, way: Way, card: int = _COMPUTED_FOR) -> Estimate:
    return estimate(_run_of(row, way), card=card * GIB)


def _run_of(row: GuideRow, way: Way) -> Run:
    return _run(row.family, row.settings_for(way), row.gpus)


def _smallest(row: GuideRow) -> str:
    """The smallest card that --memory auto fits, where the host has room."""
    fitting = (card for card in _CARDS if _estimate(row, "auto", card).fits(card * GIB))
    return f"{next(fitting)} GB"


def _native(family: str) -> str:
    return str(BY_NAME[family].native)


@lru_cache
def _subject(family: str, resolution: str) -> tuple[Checkpoint, ShardSet]:
    checkpoint = random_checkpoint(family)
    return checkpoint, random_shards(checkpoint, Resolution.parse(resolution), samples=1)


def _run(family: str, settings: TrainSettings, world: int, resolution: str | None = None) -> Run:
    return random_run(settings, *_subject(family, resolution or _native(family)), world)
