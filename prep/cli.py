"""The command line `cogprep`. Commands import what they need when they run: --help loads no torch."""

from __future__ import annotations

import typer

from cogcommon.settings import add_command, run_app

from .settings import EncodeSettings, ValidateSettings

app = typer.Typer(
    name="cogprep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _cogprep() -> None:
    """Turn a folder of clips and captions into shards that cogtrain reads."""


def _validate(settings: ValidateSettings) -> None:
    from .validate import run

    run(settings)


def _encode(settings: EncodeSettings) -> None:
    from .encode import run

    run(settings)


add_command(
    app,
    "validate",
    ValidateSettings,
    _validate,
    "Find every fault of a data root before a GPU is used, and show what encode would make of it.",
)
add_command(
    app,
    "encode",
    EncodeSettings,
    _encode,
    "Encode clips and captions into shards. Run it again after any change: only what changed is encoded.",
)


def main() -> None:
    run_app(app)
