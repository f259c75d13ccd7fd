"""The command line `cogprep`. A command imports what it needs when it runs: --help loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer

from cogcommon.settings import add_command, run_app

from .settings import (
    CleanSettings,
    EncodeSettings,
    IndexSettings,
    InspectSettings,
    PreviewSettings,
    ValidateSettings,
    VerifySettings,
)

app = typer.Typer(name="cogprep", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _cogprep() -> None:
    """Turn a folder of clips and captions into shards that cogtrain reads."""


def _run_of(module: str) -> Callable[[Any], None]:
    """``run`` of a module, imported when it is called."""
    return lambda settings: import_module(f".{module}", __package__).run(settings)


# Command, its settings, the module whose `run` carries it out, and what help says.
for _name, _settings, _module, _help in (
    (
        "validate",
        ValidateSettings,
        "validate",
        "Find every fault of a data root before a GPU is used, and show what encode would make of it.",
    ),
    (
        "encode",
        EncodeSettings,
        "encode",
        "Encode clips and captions into shards. Run it again after any change: only what changed is encoded.",
    ),
    ("inspect", InspectSettings, "contents", "Show what is in a folder of shards: contract, counts, sizes, samples."),
    ("verify", VerifySettings, "verify", "Read every byte of every shard and compare it with its record."),
    (
        "preview",
        PreviewSettings,
        "preview",
        "Draw what was encoded: the source with what was cut, and the decoded latents beside it.",
    ),
    ("index", IndexSettings, "index", "Put back lost records and a lost contract, where the shards prove them."),
    (
        "clean-cache",
        CleanSettings,
        "clean",
        "Remove what is stale, orphaned or half-written from a folder of shards. Never touches the data root.",
    ),
):
    add_command(app, _name, _settings, _run_of(_module), _help)


def main() -> None:
    run_app(app)
