"""The command line `cogprep`. A command imports what it needs when it runs: --help loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from cogcommon.cli import interrupt
from cogcommon.cli.command import add_command, make_app, run_app
from cogcommon.cli.leaving import run_and_leave
from cogcommon.jobs.settings import LaunchSettings

from .settings.encode import EncodeSettings, ValidateSettings
from .settings.lists import CaptionSettings, InitSettings, SplitSettings
from .settings.shards import CleanSettings, IndexSettings, InspectSettings, PreviewSettings, VerifySettings

app = make_app("cogprep", "Turn a folder of clips and captions into shards that cogtrain reads.")


def _run_of(module: str) -> Callable[[Any], None]:
    """``run`` of a module, imported when it is called."""
    return lambda settings: import_module(f".commands.{module}", __package__).run(settings)


# Command, its settings, the module whose `run` carries it out, what help says, and examples.
_COMMANDS: tuple[tuple[str, type[Any], str, str, tuple[str, ...]], ...] = (
    (
        "init",
        InitSettings,
        "init",
        "Write the lists of a data root from the clips and captions in it. A list that is there stays as it is; --add "
        "appends what it lacks.",
        ("cogprep init ds", "cogprep init ds --add"),
    ),
    (
        "split",
        SplitSettings,
        "split",
        "Write the lists of a data root whose clips are parts of long footage. Nothing is copied or encoded.",
        ("cogprep split film.mp4 --out ds", "cogprep split films/ --out ds --every 6"),
    ),
    (
        "caption",
        CaptionSettings,
        "caption",
        "Fill the blank lines of prompts.txt with what a vision-language model sees. Never touches a line with words.",
        ("cogprep caption ds", 'cogprep caption ds --form short --prefix "sks"'),
    ),
    (
        "validate",
        ValidateSettings,
        "validate",
        "List every fault of a data root at once, and show what encode would make of it. Needs no GPU.",
        ("cogprep validate --data-root ds/ --resolution 49x480x720",),
    ),
    (
        "encode",
        EncodeSettings,
        "encode",
        "Encode clips and captions into shards. Run it again after any change: only what changed is encoded.",
        (
            "cogprep encode --data-root ds/ --resolution 49x480x720",
            "cogprep encode --data-root ds/ --resolution 17x64x96 --model tiny --out try",
        ),
    ),
    (
        "launch",
        LaunchSettings,
        "launch",
        "Write an encode as a job for Slurm, Kubernetes or SkyPilot, divided among machines. Checked before it queues.",
        (
            "cogprep launch --on slurm --nodes 4 --gpus 8 -- encode --data-root ds --resolution 49x480x720",
            "cogprep launch --on kubernetes --nodes 4 --image registry/cogtune --volume claim:/data -- encode "
            "--data-root ds --resolution 49x480x720",
        ),
    ),
    (
        "inspect",
        InspectSettings,
        "inspection",
        "Show what is in a folder of shards: settings, counts, sizes, samples.",
        ("cogprep inspect out",),
    ),
    (
        "verify",
        VerifySettings,
        "verify",
        "Read every byte of every shard and compare it with its record.",
        ("cogprep verify out --reencode 4",),
    ),
    (
        "preview",
        PreviewSettings,
        "preview",
        "Draw what was encoded: the source, what was cut off, and the decoded latents beside it.",
        ("cogprep preview out --samples 4",),
    ),
    (
        "index",
        IndexSettings,
        "index",
        "Rebuild lost records and a lost contract from the shards themselves.",
        ("cogprep index out",),
    ),
    (
        "clean-cache",
        CleanSettings,
        "clean_cache",
        "Remove what is stale, orphaned or half-written from a folder of shards. Never touches the data root.",
        ("cogprep clean-cache --dry-run", "cogprep clean-cache --out out --all --yes"),
    ),
)
_PANELS = {  # headings of --help
    "Lists of clips and captions": ("init", "split", "caption", "validate"),
    "Encode": ("encode", "launch"),
    "Shards": ("inspect", "verify", "preview", "index", "clean-cache"),
}
_ONLY_PRINT = ("validate", "inspect", "verify")
for _name, _settings, _module, _help, _examples in _COMMANDS:
    _panel = next(panel for panel, names in _PANELS.items() if _name in names)
    add_command(
        app, _name, _settings, _run_of(_module), _help, _examples, _panel, only_prints=_name in _ONLY_PRINT
    )  # fmt: skip


def main() -> None:
    """The program, which ends this process."""
    run_and_leave(run)


def run() -> None:
    """The command line; raises SystemExit."""
    interrupt.catch_interrupts()
    with interrupt.exit_code():
        run_app(app)
