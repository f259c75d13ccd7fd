"""Writes ``report.html`` of a run: one page that needs nothing from elsewhere; the videos lie beside it.

`cogtrain watch` serves the same page, which then renews itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from cogcommon.cli.names import plain
from cogcommon.cli.progress import stage
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.ownership import Made
from cogcommon.words import counted, in_words

from ..runs.folder import (
    CAPTIONS_FILE,
    CLIPS,
    COMPARED,
    GENERATED,
    REPORT_FILE,
    SHEET_FILE,
    VALIDATION,
    RecordedRun,
    drawn_prompts,
    drawn_step,
    embedding_file,
    lowest,
    page_head,
    read_run,
    report_head,
)
from .chart import Line, number, plot, smoothed
from .drawn import asked_of, kept_weights, trained_step

RUN_COLOURS = 6  # of `report.css`


@stage("writing the report")
def write_report(folder: Path) -> Path:
    """Write the report of a run as it stands; also of one that still trains.

    Raises:
        RunError: no run folder.
    """
    path = folder / REPORT_FILE
    commit_bytes(path, plain(page(read_run(folder))).encode())
    return path


def page(run: RecordedRun, *, live: int = 0, beside: str = "") -> str:
    """The page of a run, as HTML.

    Args:
        live: seconds between the page's looks at what is new; 0: it is a file.
        beside: HTML of the server, after the heading.
    """
    facts = run.facts
    parts = {
        "state": f"{_state(run)}{beside}",
        "figures": _figures(run),
        "curves": "".join(_curves(run)),
        "videos": "".join(_videos(run, newest_first=bool(live))),
        "tables": "".join(_tables(run)),
    }
    return _document(report_head(facts), f"{facts.title} of {facts.model}", parts, live)


def comparison(runs: Sequence[tuple[str, RecordedRun]], *, live: int) -> str:
    """The curves of several runs over one another, and where each stands.

    Args:
        runs: where a run's own page is, and the run.
        live: see `page`.
    """
    losses, held_out, rows = [], [], []
    for place, (href, run) in enumerate(runs):
        name, style = run.folder.name or str(run.folder), f"run-{place % RUN_COLOURS}"
        points = smoothed([(line.step, line.loss) for line in run.steps if line.loss is not None])
        losses.append(Line(name, points, style, trimmed=True))
        measured = [(line.step, line.val_loss) for line in run.validations if line.val_loss is not None]
        held_out.append(Line(name, measured, style, marks=True))
        rows.append(
            f'<tr><td class="{style}"><i></i><a href="{escape(href)}">{escape(name)}</a><td>{_state(run)}'
            f"<td><code>{escape(' '.join(_told_apart(run, runs)))}</code></tr>"
        )
    parts = {
        "table": f'<table class="runs">{"".join(rows)}</table>',
        "curves": plot("Loss, smoothed", losses, tools=True),
    }
    if any(line.points for line in held_out):
        parts["held-out"] = plot("Held-out loss", held_out, tools=True)
    title = counted(len(runs), "run")
    return _document(page_head(title), title, parts, live)


def _document(head: str, title: str, parts: Mapping[str, str], live: int) -> str:
    """A page of parts, each of which the live page renews alone."""
    body = "".join(f'<section data-part="{name}">{part}</section>' for name, part in parts.items())
    return (
        f"{head}{asset('report.css')}</style><body{f' data-live={live}' if live else ''}>"
        f"<h1>{escape(title)}</h1>{body}<script>{asset('report.js')}</script></body></html>\n"
    )


def _told_apart(run: RecordedRun, runs: Sequence[tuple[str, RecordedRun]]) -> Iterable[str]:
    """The settings in which a run differs from another of them."""
    for name, value in run.settings.items():
        if name != "out" and any(other.settings.get(name) != value for _, other in runs):
            yield f"{name}={_plain(value)}"


def asset(name: str) -> str:
    """A file of this package, as text."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _state(run: RecordedRun) -> str:
    """How far it is, since when, and how long it will take."""
    facts = run.facts
    done, ended = run.steps[-1].step if run.steps else 0, facts.ended
    state = "finished" if done >= facts.steps else f"{done:,} of {facts.steps:,} steps"
    if ended:
        state = f"ended after {state}: {ended}"
    times = []
    if facts.begun:
        times.append("begun " + time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.begun)))
    if run.steps:
        times.append(f"{in_words(sum(line.s_per_step + line.compile_s for line in run.steps))} of training")
        if done < facts.steps and not ended:
            times.append(f"about {in_words((facts.steps - done) * seconds_a_step(run))} left")
    return (
        f'<p class="faint">{escape(str(run.folder))} · {state} · {facts.device} · {escape(facts.strategy)}, '
        f"{facts.precision}, {counted(facts.processes, 'process', 'processes')}</p>"
        + (f'<p class="faint">{" · ".join(times)}</p>' if times else "")
    )


def seconds_a_step(run: RecordedRun) -> float:
    """Seconds a step, median. The first steps warm caches and compile kernels."""
    return median(line.s_per_step for line in run.steps[min(3, len(run.steps) - 1) :])


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
        best = lowest(run.validations)
        if best and best.val_loss is not None and best != last:
            change = f", {best.change:+.1f} %" if best.change is not None else ""
            shown.append((number(best.val_loss), f"lowest held-out loss, at step {best.step:,}{change}"))
    if run.facts.exported:
        shown.append((f"step {run.facts.exported:,}", "is exported"))
    if run.steps:
        middle = seconds_a_step(run)
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
        best = lowest(run.validations)
        if best and best.val_loss is not None and len(run.validations) > 1:
            lines.append(Line(f"lowest, step {best.step:,}", [(best.step, best.val_loss)], "held-out best", marks=True))
    yield f"<h2>Curves</h2>{plot('Loss', lines, tools=True)}"
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
        yield plot(name, [Line(name, points, "plain", trimmed=name != "Learning rate")], small=True)
    yield "</div>"


def _videos(run: RecordedRun, *, newest_first: bool) -> Iterable[str]:
    """A row a prompt or a held-out sample: what is given, the base model's video, each validation's; then what was
    generated."""
    folder = run.folder
    prompts = ((prompt, name, _first_frame(folder, name)) for name, prompt in drawn_prompts(folder).items())
    if rows := "".join(_validated(folder, prompts, newest_first)):
        yield f"<h2>Prompts</h2>{rows}"
    captions_file = folder / VALIDATION / CAPTIONS_FILE
    captions = json.loads(captions_file.read_text(encoding="utf-8")) if captions_file.exists() else []
    clips = ((caption, str(index), _itself(folder, index)) for index, caption in enumerate(captions))
    if rows := "".join(_validated(folder, clips, newest_first)):
        yield f"<h2>Held-out clips</h2>{rows}"
    grids = sorted((folder / COMPARED).glob("*/grid.mp4"), key=lambda path: path.stat().st_mtime, reverse=True)
    if grids:
        yield "<h2>Compared</h2>" + "".join(_row(folder, _prompt(path.parent), [("", path)]) for path in grids)
    made = sorted((folder / GENERATED).glob("*/*.mp4"), key=lambda path: path.stat().st_mtime, reverse=True)
    folders = list(dict.fromkeys(path.parent for path in made))
    kept = kept_weights(run) if folders else {}
    if folders:
        yield "<h2>Generated</h2>"
    for place in folders:
        yield _row(folder, _prompt(place), _generated(place, trained_step(kept, place)))


def _generated(place: Path, step: int | None) -> list[tuple[str, Path]]:
    """The base model's video, as everywhere first, the tuned one next to it, then both in one."""
    tuned = "tuned, step not known" if step is None else f"tuned, step {step:,}"
    names = {"base": "base model", "tuned": tuned, "side-by-side": "side by side"}
    files = sorted(place.glob("*.mp4"), key=lambda path: [*names, path.stem].index(path.stem))
    return [(names.get(path.stem, path.stem), path) for path in files]


def _validated(
    folder: Path, asked: Iterable[tuple[str, str, Iterable[tuple[str, Path]]]], newest_first: bool
) -> Iterable[str]:  # fmt: skip
    """A row for each of which there are videos.

    Args:
        asked: the text, the name of its files, and what stands before its videos.
    """
    rounds = sorted((path for path in (folder / VALIDATION).glob("step-*") if path.is_dir()), key=drawn_step)
    for text, name, given in asked:
        found = [(_label(path), path / f"{name}.mp4") for path in rounds if (path / f"{name}.mp4").exists()]
        if found:
            yield _row(folder, text, [*given, *(found[::-1] if newest_first else found)])


def _first_frame(folder: Path, prompt: str) -> Iterable[tuple[str, Path]]:
    """What was given beside a prompt."""
    if (path := embedding_file(folder, prompt).with_suffix(".png")).exists():
        yield "first frame", path


def _itself(folder: Path, index: int) -> Iterable[tuple[str, Path]]:
    """The held-out clip as it is stored, and the first frame that was given."""
    for label, name in (("the clip itself", f"{index}.mp4"), ("first frame", f"{index}.png")):
        if (path := folder / VALIDATION / CLIPS / name).exists():
            yield label, path


def _prompt(folder: Path) -> str:
    """Of a folder of generated videos, and whether the command was stopped before it had written all of it."""
    made = Made.read(folder)
    half = " (not finished)" * bool(made and SHEET_FILE not in made.files)
    return str(asked_of(made).get("prompt", folder.name)) + half


def _label(path: Path) -> str:
    return "base model" if drawn_step(path) == 0 else f"step {drawn_step(path):,}"


def _row(folder: Path, caption: str, shown: Iterable[tuple[str, Path]]) -> str:
    """Videos of a caption; one without a label is a grid, which is shown as wide as the page."""
    figures = []
    for label, path in shown:
        source = quote(path.relative_to(folder).as_posix())
        tag = f'<img src="{source}" alt="{escape(label)}">'
        if path.suffix == ".mp4":  # still until it is played: twenty that move at once show nothing
            tag = f'<video src="{source}" controls loop muted playsinline preload="metadata"></video>'
        below = f"<figcaption>{escape(label)}</figcaption>" if label else ""
        figures.append(f"<figure{'' if label else ' class=grid'}>{tag}{below}</figure>")
    button = '<button type="button" class="together">play all</button>'
    return (
        f'<div class="sample"><blockquote>{escape(caption)} {button}</blockquote>'
        f'<div class="row">{"".join(figures)}</div></div>'
    )


def _tables(run: RecordedRun) -> Iterable[str]:
    facts = run.facts
    samples = sum(facts.samples.values())
    begun = f"{facts.samples_at_start:,} at the start, now " if facts.samples_at_start else ""
    data = {
        "samples": f"{begun}{counted(samples, 'sample')} in {counted(facts.shards, 'shard')}, "
        f"{facts.held_out:,} held out",
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
