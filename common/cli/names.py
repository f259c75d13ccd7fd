"""Names, captions and paths as a person can read them, a shell can take them, and JSON can hold them.

A name may hold what a terminal obeys (an escape sequence), what nobody sees (a zero-width space, an order to
write from right to left), or bytes that are no UTF-8.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

# Control characters but for tab and new line, what changes the direction of text, what has no width, and
# halves of a surrogate pair, which is how Python holds bytes of a name that are no UTF-8. The joiners
# U+200C and U+200D stay: emoji and Persian need them.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def plain(text: str) -> str:
    r"""A text without anything that a terminal would obey or a reader not see: ``\x1b``, ``\u200b`` instead."""
    return UNSEEN.sub(lambda match: _in_ascii(match[0]), text)


def _in_ascii(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def command_line(*words: object) -> str:
    """A command line that a shell takes as these words."""
    return " ".join(quoted(word) for word in words)


def quoted(word: object) -> str:
    r"""One word for a shell; with unseen characters as ``$'\x1b'``, which bash, zsh and ksh read."""
    text = str(word)
    if not UNSEEN.search(text) and "\n" not in text and "\t" not in text:
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return "$'" + UNSEEN.sub(lambda match: "".join(f"\\x{byte:02x}" for byte in _bytes(match[0])), escaped) + "'"


def _bytes(character: str) -> bytes:
    return character.encode("utf-8", "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass")


def tars_in(folder: Path | str) -> str:
    """A shell's pattern of all shards of a folder; the name of the folder is no part of the pattern."""
    return f"{quoted(folder)}/*.tar"


def json_text(value: Any, indent: int | None = 1) -> str:
    """JSON that people can read as well, with nothing in it that a terminal would obey or UTF-8 cannot hold.

    Args:
        indent: as `json.dumps`; None: one line.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)  # they stand in strings only
