"""Writes ``report.html`` of a run: one page without scripts or server; the videos lie beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from cogcommon.cli.names import plain
from cogcommon.files.atomic import commit_bytes
from cogcommon.words import counted

from ..runs.folder import REPORT_FILE, VALIDATION, RecordedRun, read_run, report_head
from .chart import Line, chart, number, smoothed


def write_report(folder: Path) -> Path:
    """Write the report of a run as it stands; also of one that still trains.

    Raises:
        RunError: no run folder.
    """
    path = folder / REPORT_FILE
    commit_bytes(path, plain(page(read_run(folder))).encode())
    return path


def page(run: RecordedRun) -> str:
    """The page of a run, as HTML."""
    facts = run.facts
    done = run.steps[-1].step if run.steps else 0
    state = "finished" if done >= facts.steps else f"{done:,} of {facts.steps:,} steps"
    body = [
        f"<h1>{facts.title} of {escape(facts.model)}</h1>",
        f'<p class="faint">{escape(str(run.folder))} · {state} · {facts.device} · {escape(facts.strategy)}, '
        f"{facts.precision}, {counted(facts.processes, 'process', 'processes')}</p>",
        _figures(run),
        *_curves(run),
        *_videos(run.folder),
        *_tables(run),
    ]
    return f"{report_head(facts)}{_style()}</style><body>{''.join(body)}</body></html>\n"


def _style() -> str:
    return resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")


def _figures(run: RecordedRun) -> str:
    shown: list[tuple[str, str]] = []
    losses = [(line.step, line.loss) for line in run.steps if line.loss is not None]
    if losses:
        shown.append((number(smoothed(losses)[-1][1]), "training loss, smoothed"))
    if run.validations:
        last = run.validations[-1]
        shown.append(("not finite" if last.val_loss is None else number(last.val_loss), "held-out loss"))
        if last.change is not None and last.base_val_loss is not None:
            shown.append((f"{last.change:+.1f} %", f"against the base model's {number(last.base_val_loss)}"))
    if run.steps:
        # The first steps warm caches and compile kernels.
        settled = sorted(line.s_per_step for line in run.steps[min(3, len(run.steps) - 1) :])
        middle = settled[len(settled) // 2]
        shown.append((number(middle), "seconds a step, median"))
        shown.append((number(run.facts.global_batch / middle), "samples a second"))
        place = "of the GPU" if run.facts.device != "CPU" else "of a process"
        shown.append((f"{max(line.peak_gib for line in run.steps):.1f} GiB", f"peak memory {place}"))
    return (
        '<div class="figures">' + "".join(f"<div><b>{b}</b><span>{escape(s)}</span></div>" for b, s in shown) + "</div>"
    )


def _curves(run: RecordedRun) -> Iterable[str]:
    losses = [(line.step, line.loss) for line in run.steps if line.loss is not None]
    if not losses:
        return
    lines = [Line("each step", losses, "raw", trimmed=True), Line("smoothed", smoothed(losses), "smooth")]
    if run.validations:
        base = run.validations[-1].base_val_loss
        # Before the first step the model is the base model.
        measured = [(0, base), *((line.step, line.val_loss) for line in run.validations)]
        held_out = [(step, loss) for step, loss in measured if loss is not None]
        if base is not None:
            lines.append(Line("base model, held out", [(0, base), (losses[-1][0], base)], "base"))
        lines.append(Line("held out", held_out, "held-out", marks=True))
    legend = "".join(f'<span class="{line.style}"><i></i>{line.name}</span>' for line in lines)
    yield f'<h2>Loss</h2><figure><div class="legend">{legend}</div>{chart(lines)}</figure>'
    if run.validations:
        yield (
            '<p class="faint">Held-out loss is taken on samples that are not trained, at fixed timesteps with fixed '
            "noise, so every point and the base line measure the same thing. Its level need not equal the training "
            "loss, which is taken at timesteps drawn anew.</p>"
        )
    small = {
        "Learning rate": [(line.step, line.lr) for line in run.steps],
        "Gradient norm": [(line.step, line.grad_norm) for line in run.steps if line.grad_norm is not None],
        "Seconds a step": [(line.step, line.s_per_step) for line in run.steps],
    }
    yield '<div class="small">'
    for name, points in small.items():
        drawn = chart(
            [Line(name, points, "plain", trimmed=name != "Learning rate")], width=400, height=190, steps_shown=3
        )
        yield f"<figure><figcaption>{name}</figcaption>{drawn}</figure>"
    yield "</div>"


def _videos(folder: Path) -> Iterable[str]:
    """A row a sample: base model first, then each validation."""
    captions_file = folder / VALIDATION / "captions.json"
    if not captions_file.exists():
        return
    captions = json.loads(captions_file.read_text(encoding="utf-8"))
    rounds = sorted((path for path in (folder / VALIDATION).glob("step-*") if path.is_dir()), key=_step_of)
    yield "<h2>Validation videos</h2>"
    for index, caption in enumerate(captions):
        found = [path for path in rounds if (path / f"{index}.mp4").exists()]
        if not found:
            continue
        yield f'<blockquote>{escape(caption)}</blockquote><div class="row">'
        for path in found:
            label = "base model" if _step_of(path) == 0 else f"step {_step_of(path):,}"
            source = f"{VALIDATION}/{path.name}/{index}.mp4"
            yield (
                f'<figure><video src="{source}" loop muted autoplay playsinline preload="metadata"></video>'
                f"<figcaption>{label}</figcaption></figure>"
            )
        yield "</div>"


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def _tables(run: RecordedRun) -> Iterable[str]:
    facts = run.facts
    samples = sum(facts.samples.values())
    data = {
        "samples": f"{counted(samples, 'sample')} in {counted(facts.shards, 'shard')}, {facts.held_out:,} held out",
        "sizes": ", ".join(f"{bucket} ({count:,})" for bucket, count in facts.samples.items()),
        "samples' fingerprint": facts.shards_fingerprint,
        "encoding's fingerprint": facts.contract_fingerprint,
        "base model": facts.model + (f" at {facts.revision}" if facts.revision else ""),
        "family": f"{facts.family}, {facts.task}",
        "trained weights": f"{facts.trainable:,}",
        "global batch": f"{facts.global_batch:,}",
        "steps": f"{facts.steps:,}",
        "made with": f"cogtrain {facts.version}",
    }
    yield "<h2>Shards and model</h2>" + _table(data.items())
    yield '<h2>Settings</h2><div class="tables">'
    settings = list(run.settings.items())
    half = -(-len(settings) // 2)
    yield _table(settings[:half]) + _table(settings[half:]) + "</div>"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><td>{escape(str(n))}<td><code>{escape(_plain(v))}</code></tr>" for n, v in rows)
    return f"<table>{cells}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:6]))
        return shown + (f" … ({len(value)} in all)" if len(value) > 6 else "")
    return str(value).lower() if isinstance(value, bool) else str(value)
