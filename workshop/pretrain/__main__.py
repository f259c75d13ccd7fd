"""``python -m workshop.pretrain vae|transformer|all|exam|concept``: make the built-in model, examine it, teach it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogcommon.cli.progress import shown
from cogcommon.libraries import quiet_libraries
from cogcommon.model.device import pick_device

if TYPE_CHECKING:
    import torch

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Folder = Annotated[Path, typer.Argument(help="Working folder; what is there is continued.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps in all.")]
Minutes = Annotated[float | None, typer.Option(help="Of training in all; the learning rate ends with them.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Seed = Annotated[int, typer.Option(help="For the initial weights and all that is drawn.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that draw the clips before the first step.")]
Graphs = Annotated[bool, typer.Option("--graphs", help="On a GPU: capture each step as a CUDA graph.")]
Calls = Annotated[
    float, typer.Option(min=1, help="Calls as long as this one in which the run ends, this one included.")
]
Variants = Annotated[int, typer.Option(min=1, help="Clips of each scene, each a few pixels off.")]
Scenes = Annotated[int | None, typer.Option(min=1, help="Of the scenes to train on, the first; for a trial.")]
Guidance = Annotated[list[float], typer.Option(help="1 is none; one exam each.")]
Form = Annotated[str, typer.Option(help="Which built-in form.")]


@app.callback()
def main() -> None:
    """Make the weights of the built-in model from nothing, part by part."""


@app.command()
def vae(
    folder: Folder,
    steps: Steps = None,
    minutes: Minutes = None,
    lr: Rate = 6e-4,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Whole clips of a step; 16 on a GPU.")] = 1,
    pool: Annotated[int, typer.Option(min=1, help="Clips to draw, once, and to learn from.")] = 12_000,
    workers: Workers = 0,
    graphs: Graphs = False,
) -> None:
    """Train the VAE."""
    device = _device()
    from .vae import train_vae

    train_vae(
        folder,
        steps=steps,
        minutes=minutes,
        lr=lr,
        seed=seed,
        device=device,
        batch=batch_size,
        pool=pool,
        workers=workers,
        graphs=graphs,
        command=_command(folder),
    )


@app.command()
def transformer(
    folder: Folder,
    form: Form = "tiny",
    steps: Steps = None,
    minutes: Minutes = None,
    until: Annotated[float | None, typer.Option(help="Stop and save at this moment, in seconds of Unix time.")] = None,
    calls: Calls = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of a step.")] = 128,
    lr: Rate = 5e-4,
    decay: Annotated[float, typer.Option(min=0, help="Of the weights, for each unit of the learning rate.")] = 0.1,
    seed: Seed = 0,
    variants: Variants = 16,
    scenes: Scenes = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of encoded clips that several forms share.")] = None,
    first: Annotated[Path | None, typer.Option(help="Weights to begin with.")] = None,
    workers: Workers = 0,
    graphs: Graphs = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="On a GPU: compile the blocks.")] = False,
    clips: Annotated[int, typer.Option(help="Held-out captions to examine it on at the end; 0: none.")] = 0,
    guidance: Guidance = [3.0],  # noqa: B006
) -> None:
    """Train the transformer of one form, on the latents of the VAE that the form has."""
    device = _device()
    from cogcommon.model.checkpoint import open_checkpoint

    from ..scenes import split_scenes
    from .transformer import train_transformer

    train_transformer(
        open_checkpoint(form),
        split_scenes()[0][:scenes],
        folder,
        steps=steps,
        minutes=minutes,
        until=until,
        calls=calls,
        batch_size=batch_size,
        lr=lr,
        decay=decay,
        seed=seed,
        device=device,
        variants=variants,
        cache=cache,
        first=first,
        workers=workers,
        graphs=graphs,
        compiled=compiled,
    )
    if clips:
        exam(folder, form=form, clips=clips, guidance=guidance, batch_size=25)


@app.command("all")
def every_form(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Gets the weights, the exams and one picture of all: seven files.")],
    minutes: Annotated[float, typer.Option(help="That this call may take, exams included.")],
    calls: Calls = 1.0,
    clips: Annotated[int, typer.Option(min=1, max=100, help="Held-out captions to examine each form on.")] = 25,
    guidance: Guidance = [3.0],  # noqa: B006
    reserve: Annotated[float, typer.Option(help="Seconds kept for the exams at the end.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of a step.")] = 128,
    variants: Variants = 16,
    scenes: Scenes = None,
    first: Annotated[Path | None, typer.Option(help="Folder with weights of the forms to begin with.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="These forms alone.")] = None,
) -> None:
    """Train all forms beside one another on one device, call after call, and bring out what there is.

    Each call continues the last in FOLDER and stops in time. The learning rate falls to zero in the last (--calls 1).
    """
    from .together import train_together

    options = ["--batch-size", str(batch_size), "--variants", str(variants)]
    failed = train_together(
        folder,
        out,
        minutes=minutes,
        reserve=reserve,
        calls=calls,
        exam=["--clips", str(clips), *(word for scale in guidance for word in ("--guidance", f"{scale:g}"))],
        options=options + (["--scenes", str(scenes)] if scenes else []),
        first=first,
        only=only or None,
    )
    raise typer.Exit(failed)


@app.command()
def exam(
    folder: Folder,
    form: Form = "tiny",
    clips: Annotated[int, typer.Option(min=1, max=100, help="How many of the held-out captions.")] = 100,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 20,
    guidance: Guidance = [3.0],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1, help="Clips to generate at once.")] = 10,
    seed: Seed = 0,
) -> None:
    """Let the judge name what the transformer in FOLDER generates for captions it was not trained on.

    Writes exam.jsonl, a line a guidance, and exam.png, a picture of the first clips.
    """
    device = _device()
    from cogcommon.model.checkpoint import open_checkpoint

    from .exam import take_exam

    lines = take_exam(
        folder,
        open_checkpoint(form),
        clips=clips,
        steps=sampling_steps,
        guidance=guidance,
        seed=seed,
        batch=batch_size,
        device=device,
    )
    for line in lines:
        typer.echo(line)


@app.command()
def concept(
    run: Annotated[Path, typer.Argument(help="Run of a fine-tune on clips of `python -m workshop.draw --new`.")],
    clips: Annotated[int, typer.Option(min=1, max=100, help="To generate of each kind, tuned and base.")] = 8,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 12,
    guidance: Annotated[float, typer.Option(help="1 is none; much makes shapes wobble.")] = 2.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips to generate at once.")] = 10,
    seed: Seed = 0,
) -> None:
    """Let the judge say whether a fine-tune learned the new motion, and whether it forgot the known scenes.

    Writes concept.webp into RUN: what was asked for, base and tuned, moving, from the same seeds.
    """
    device = pick_device()
    quiet_libraries()
    from .concept import examine_run, tell

    with shown():
        proof, animation = examine_run(
            run, clips=clips, steps=sampling_steps, guidance=guidance, seed=seed, device=device, batch=batch_size
        )
    animation.save(run / "concept.webp")
    typer.echo(tell(proof))
    typer.echo(f"asked for, base and tuned, from the same seeds: {run / 'concept.webp'}")


@app.command()
def proof(
    folder: Annotated[Path, typer.Argument(help="Where to work; must not exist.")],
    case: Annotated[str, typer.Option(help="A form, or `tiny by sft`.")] = "tiny",
    clips: Annotated[int, typer.Option(min=1, max=100, help="To generate of each kind, tuned and base.")] = 100,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 20,
    guidance: Annotated[list[float], typer.Option(help="1 is none; one examination each.")] = [3.0],  # noqa: B006
    lr: Annotated[float | None, typer.Option(help="Learning rate; the case's own unless told.")] = None,
) -> None:
    """Teach a form a motion that it has never seen, by our two programs, and examine what it learned."""
    from .proof import method_of, teach

    run = teach(folder, case, lr)
    for scale in guidance:
        typer.echo(f"{method_of(case, lr)}, {case}, guidance {scale:g}")
        concept(run, clips=clips, sampling_steps=sampling_steps, guidance=scale, batch_size=25)


def _device() -> torch.device:
    import torch

    device = pick_device()
    quiet_libraries()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return device


def _command(folder: Path) -> str:
    """What was typed, for the card; where it worked says nothing to others."""
    words = [word if word != str(folder) else "FOLDER" for word in sys.argv[1:]]
    return "python -m workshop.pretrain " + shlex.join(words)


if __name__ == "__main__":
    app()
