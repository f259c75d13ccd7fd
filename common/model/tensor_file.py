"""Opens a safetensors file, or says in words what the file is instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..cli.names import command_line
from ..errors import ModelError

_POINTER = b"version https://git-lfs"
_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_PICKLES = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # of torch.save: a zip since 1.6, and before
_CONVERT = (
    "import sys, torch, safetensors.torch as s; "
    "s.save_file({n: t.contiguous() for n, t in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])"
)


@contextmanager
def open_tensors(file: Path, what: str = "the file") -> Iterator[Any]:
    """A safetensors file as ``safetensors.safe_open`` gives it, for PyTorch; only its header has been read.

    Args:
        what: it is called in messages.

    Raises:
        ModelError: it is none, or is cut short; says what it is instead, and what to do.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        instead, fix = _instead(file, error)
        raise ModelError(f"{what} {instead}", where=str(file), fix=fix) from error
    with opened as tensors:
        yield tensors


def _instead(file: Path, error: Exception) -> tuple[str, str]:
    """What a file is that is no safetensors file, behind its name, and what to do."""
    try:
        with file.open("rb") as stream:
            beginning = stream.read(1024)
    except OSError:
        return f"cannot be read: {error}", "give a .safetensors file"
    if not beginning:
        return "is damaged or cut short: it is empty", "fetch it again"
    if beginning.startswith(_POINTER):
        return "is a pointer of Git LFS, and not the weights themselves", "git lfs pull, in its folder"
    if _PAGE.match(beginning):
        return "is a web page", "fetch the file itself: on the hub, the link with /resolve/ in it, not /blob/"
    if beginning.startswith(_PICKLES):
        convert = command_line("python", "-c", _CONVERT, file, file.with_suffix(".safetensors"))
        return "is a pickle: reading one can run any program", f"take a .safetensors file, or convert it: {convert}"
    return f"is damaged or cut short: {error}", "fetch it again; it must be a .safetensors file"
