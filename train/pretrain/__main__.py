"""``python -m cogtrain.pretrain vae|t2v``: make the weights of the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogcommon.device import pick_device, quiet_libraries

app = typer.Typer(add_completion=False, no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Working folder; what is there is continued.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps in all.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Seed = Annotated[int, typer.Option(help="For the initial weights and every drawn clip.")]


@app.callback()
def main() -> None:
    """Make the weights of the built-in model from nothing, part by part."""


@app.command()
def vae(
    folder: Folder,
    steps: Steps = 5_500,
    lr: Rate = 6e-4,
    seed: Seed = 0,
    scale: Annotated[int, typer.Option(min=1, help="Times as many clips a step; 16 on a GPU.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw clips ahead.")] = 0,
) -> None:
    """Train the VAE."""
    device = pick_device()
    quiet_libraries()
    from .vae import train_vae

    train_vae(folder, steps=steps, lr=lr, seed=seed, device=device, scale=scale, workers=workers)


@app.command()
def transformer(
    folder: Folder,
    form: Annotated[str, typer.Option(help="Which built-in form.")] = "tiny",
    steps: Steps = 6_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of a step.")] = 16,
    lr: Rate = 1e-3,
    seed: Seed = 0,
    text_tokens: Annotated[
        int | None, typer.Option(help="Train on shorter texts first; longer ones cost time.")
    ] = None,
) -> None:
    """Train the transformer of one form, on the latents of the VAE that the form has."""
    device = pick_device()
    quiet_libraries()
    from cogcommon.checkpoint import open_checkpoint

    from .transformer import split_scenes, train_transformer

    train_transformer(
        open_checkpoint(form),
        split_scenes(seed)[0],
        folder,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        device=device,
        text_tokens=text_tokens,
    )


@app.command()
def exam(
    folder: Folder,
    form: Annotated[str, typer.Option(help="Which built-in form.")] = "tiny",
    clips: Annotated[int, typer.Option(min=1, max=100, help="How many of the held-out captions.")] = 100,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 20,
    guidance: Annotated[float, typer.Option(help="1 is none.")] = 3.0,
    seed: Seed = 0,
) -> None:
    """Let the judge name what the transformer in FOLDER generates for captions it was not trained on."""
    device = pick_device()
    quiet_libraries()
    import dataclasses
    import json

    import diffusers
    import torch

    from cogcommon.checkpoint import open_checkpoint

    from .exam import examine, load_pipeline
    from .transformer import split_scenes

    checkpoint = open_checkpoint(form)
    transformer = diffusers.CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer_config))
    transformer.load_state_dict(torch.load(folder / "state.pt", map_location="cpu", weights_only=True)["model"])
    marks = examine(
        load_pipeline(checkpoint, transformer, device),
        checkpoint,
        split_scenes(seed)[1][:clips],
        steps=sampling_steps,
        guidance=guidance,
        seed=seed,
    )
    typer.echo(json.dumps({name: mark and round(mark, 3) for name, mark in dataclasses.asdict(marks).items()}))


if __name__ == "__main__":
    app()
