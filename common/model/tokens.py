"""How much of a text a model reads: T5 gives it so many tokens, and the rest is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CutText:
    """A text that is longer than the model reads.

    Attributes:
        tokens: of the whole, the end token included.
        kept: what is read.
        lost: what is not.
    """

    tokens: int
    kept: str
    lost: str


def cut_text(text: str, tokenizer: Any, limit: int) -> CutText | None:
    """Where a text is cut; None where it is read to its end.

    Args:
        tokenizer: the checkpoint's own T5 tokenizer.
        limit: tokens that the model reads, the end token included.
    """
    coded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    return cut_at([end for _, end in coded["offset_mapping"]], text, limit)


def cut_at(ends: list[int], text: str, limit: int) -> CutText | None:
    """Where a text is cut, from the place where each of its tokens ends."""
    if len(ends) <= limit:
        return None
    end = ends[limit - 2]  # the end token takes the last place
    return CutText(len(ends), text[:end].rstrip(), text[end:].lstrip())
