"""The console of both programs: it prints names and captions as they are, and harmless.

Rich would take ``[v2]`` for markup and ``:dog:`` for a picture; a terminal would obey an escape sequence.
"""

from __future__ import annotations

import codecs
import io
import sys
from typing import Any

import rich.console
from rich.text import Text

from ..errors import CogError
from .names import plain


def styled(*parts: str | tuple[str, str]) -> Text:
    """A line of some parts; a pair is a text and its style."""
    return Text.assemble(*(plain(part) if isinstance(part, str) else (plain(part[0]), part[1]) for part in parts))


class Console(rich.console.Console):
    """Prints texts as they are. Style comes with ``style=`` or `styled`, never from the text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Called by rich for every text that it is given, cells of tables too."""
        return super().render_str(plain(text), **options)


def show_error(error: CogError) -> None:
    """The three parts of an error, on stderr."""
    console = Console(stderr=True, soft_wrap=True)
    head, *rest = str(error).split("\n")
    console.print(styled(("error:", "bold red"), " ", (head, "red")))
    for line in rest:
        console.print(line)


def print_in_any_encoding() -> None:
    r"""Let this process print every text: what the terminal's encoding lacks becomes ``\u00e9``, as in JSON."""
    codecs.register_error("as_in_json", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="as_in_json")


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2)), error.end
