"""The command line of cogtrain. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys

import typer

from cogcommon.errors import CogError
from cogcommon.settings import add_command, run_app

from .settings import ExportSettings, GenerateSettings, LoraSettings, PlanSettings, SftSettings, TrainSettings

app = typer.Typer(
    name="cogtrain",
    help="Fine-tune CogVideoX on the shards that cogprep encode wrote.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None:
    """Keeps commands commands, also while there is one only."""


def train(settings: TrainSettings) -> None:
    """Start a run; in several processes where there are several GPUs."""
    from .launch import join_environment, relaunch, wanted_processes

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cogcommon.device import pick_device, quiet_libraries

    joined = join_environment()
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")))
    from .run import open_run

    world = int(os.environ["WORLD_SIZE"]) if joined else wanted_processes(settings)
    try:
        run = open_run(settings, device, world)
    except CogError:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)  # every rank finds the same fault; the first one says it
        raise
    if world > 1 and not joined:
        sys.exit(relaunch(world))
    quiet_libraries()
    from .guard import PeerFailed
    from .loop import Stopped
    from .loop import train as train_run
    from .signals import StopRequest

    with StopRequest().listening() as stop:
        try:
            train_run(run, stop)
        except PeerFailed:
            sys.exit(2)  # the one that has failed says why
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":
                print(f"stopped; to resume: {stopped.command}", flush=True)
            sys.exit(stopped.code)


def plan(settings: PlanSettings) -> None:
    from .forecast import run

    run(settings)


def generate(settings: GenerateSettings) -> None:
    from .generate import run

    run(settings)


def export(settings: ExportSettings) -> None:
    from .export import run

    run(settings)


add_command(app, "lora", LoraSettings, train, help="Train a LoRA.")
add_command(app, "sft", SftSettings, train, help="Train all weights (full fine-tuning).")
add_command(app, "plan", PlanSettings, plan, help="What a card must hold under each setting, and the command to run.")
add_command(app, "generate", GenerateSettings, generate, help="Make a video, and the base model's beside it.")
add_command(app, "export", ExportSettings, export, help="Write the weights of a run for others to load, and compare.")


def main() -> None:
    run_app(app)
