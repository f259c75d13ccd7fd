"""``python -m workshop.pretrain vae|transformer|exam|concept``: make the built-in model, examine it, teach it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogcommon.model.device import pick_device, quiet_libraries

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
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of a step.")] = 16,
    lr: Rate = 1e-3,
    seed: Seed = 0,
    text_tokens: Annotated[
        int | None, typer.Option(help="Train on shorter texts than the family's; long ones cost time.")
    ] = None,
    workers: Workers = 0,
    graphs: Graphs = False,
) -> None:
    """Train the transformer of one form, on the latents of the VAE that the form has."""
    device = _device()
    from cogcommon.model.checkpoint import open_checkpoint

    from ..scenes import split_scenes
    from .transformer import train_transformer

    train_transformer(
        open_checkpoint(form),
        split_scenes()[0],
        folder,
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        device=device,
        text_tokens=text_tokens,
        workers=workers,
        graphs=graphs,
    )


@app.command()
def exam(
    folder: Folder,
    form: Form = "tiny",
    clips: Annotated[int, typer.Option(min=1, max=100, help="How many of the held-out captions.")] = 100,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 20,
    guidance: Annotated[list[float], typer.Option(help="1 is none; one exam each.")] = [3.0],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1, help="Clips to generate at once.")] = 10,
    seed: Seed = 0,
) -> None:
    """Let the judge name what the transformer in FOLDER generates for captions it was not trained on.

    Writes exam.jsonl, a line a guidance, and a picture of the first clips of each.
    """
    device = _device()
    import dataclasses
    import json

    import diffusers
    import safetensors.torch
    import torch

    from cogcommon.model.checkpoint import open_checkpoint
    from cogtrain.validation.pipeline import pipeline_of

    from ..scenes import split_scenes
    from .exam import examine, sheet

    checkpoint = open_checkpoint(form)
    model = diffusers.CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer_config))
    model.load_state_dict(safetensors.torch.load_file(folder / f"{checkpoint.family.builtin}.safetensors"))
    pipeline = pipeline_of(checkpoint, model, torch.float32).to(device)
    captions = split_scenes()[1][:clips]
    for scale in guidance:
        marks, shown = examine(
            pipeline, checkpoint, captions, steps=sampling_steps, guidance=scale, seed=seed, batch=batch_size
        )
        found = {name: mark and round(mark, 3) for name, mark in dataclasses.asdict(marks).items()}
        line = json.dumps({"form": form, "guidance": scale, "steps": sampling_steps, "clips": len(captions), **found})
        typer.echo(line)
        with (folder / "exam.jsonl").open("a", encoding="utf-8") as out:
            out.write(line + "\n")
        sheet(captions, shown).save(folder / f"guidance-{scale:g}.png")


@app.command()
def concept(
    run: Annotated[Path, typer.Argument(help="Run of a fine-tune on clips of `python -m workshop.draw --new`.")],
    clips: Annotated[int, typer.Option(min=1, max=100, help="To generate of each kind, tuned and base.")] = 8,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 12,
    guidance: Annotated[float, typer.Option(help="1 is none; much makes shapes wobble.")] = 2.0,
    seed: Seed = 0,
) -> None:
    """Let the judge say whether a fine-tune learned the new motion, and whether it forgot the known scenes.

    Writes concept.webp into RUN: what was asked for, base and tuned, moving, from the same seeds.
    """
    pick_device()
    quiet_libraries()
    from .concept import examine_run, tell

    proof, animation = examine_run(run, clips=clips, steps=sampling_steps, guidance=guidance, seed=seed)
    animation.save(run / "concept.webp")
    typer.echo(tell(proof))
    typer.echo(f"asked for, base and tuned, from the same seeds: {run / 'concept.webp'}")


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
