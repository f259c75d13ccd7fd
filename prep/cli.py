"""The command line `cogprep`. Commands import what they need when they run: --help loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogcommon.settings import add_command, run_app

from .settings import CleanSettings, EncodeSettings, PreviewSettings, ValidateSettings

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


def _clean(settings: CleanSettings) -> None:
    from .clean import run

    run(settings)


def _preview(settings: PreviewSettings) -> None:
    from .preview import run

    run(settings)


add_command(
    app,
    "clean-cache",
    CleanSettings,
    _clean,
    "Remove what is stale, orphaned or half-written from a folder of shards. Never touches the data root.",
)
add_command(
    app,
    "preview",
    PreviewSettings,
    _preview,
    "Draw what was encoded: the source with what was cut, and the decoded latents beside it.",
)


Out = Annotated[Path, typer.Argument(metavar="OUT", help="folder with the shards")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


@app.command("inspect")
def _inspect(out: Out, json: Json = False) -> None:
    """Show what is in a folder of shards: contract, counts, sizes, buckets, a few samples."""
    from .contents import run

    run(out, as_json=json)


@app.command("index")
def _index(out: Out, json: Json = False) -> None:
    """Put back lost records and a lost contract, where the shards themselves prove them."""
    from .index import run

    run(out, as_json=json)


@app.command("verify")
def _verify(
    out: Out,
    reencode: Annotated[int, typer.Option(min=0, help="encode this many samples again and compare")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="decode processes for --reencode")] = 1,
    json: Json = False,
) -> None:
    """Read every byte of every shard and compare it with the record."""
    from .verify import run

    run(out, reencode=reencode, workers=workers, as_json=json)


def main() -> None:
    run_app(app)
