"""A model's answer made a caption: one line, without what models put in front, no longer than CogVideoX reads."""

from __future__ import annotations

import re
from collections.abc import Callable

from cogcommon.cli.names import UNSEEN

from ..dataset.advice import in_quotes

_ABOUT = r"(?:video|clip|footage|image|picture|photo|photograph|scene|sequence|frames?|images|shot)"
_SHOWS = (
    r"(?:shows?|showcases?|depicts?|features?|captures?|displays?|presents?|portrays?|illustrates?|contains?|is of"
    r"|(?:begins?|starts?|opens?) with(?: an? (?:shot|view|close-?up|scene) of)?|appears to (?:show|depict|be of))"
)
_LOOK = r"(?:short |brief |given |provided |input |entire |whole )?"
# What stands before the caption itself, each taken off as often as it is there.
_OPENINGS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:sure|certainly|of course|okay|ok)\b[^.!?:\n]{0,60}[.!:,]\s*",
        r"(?:here(?:'s| is| are)|below is|the following is)\b[^.!?:\n]{0,80}:\s*",
        rf"(?:caption|description|(?:the )?{_ABOUT}(?: (?:caption|description))?)\s*:\s*",
        rf"(?:in|throughout|across) (?:this|the|these) {_LOOK}{_ABOUT},?\s*(?:there (?:is|are)\s+)?",
        rf"(?:this|the|these) {_LOOK}{_ABOUT}(?: (?:clip|sequence|footage))? (?:also )?{_SHOWS}\s+(?:that\s+)?",
        rf"(?:it|this) (?:shows|depicts|is) (?:a|an) {_LOOK}{_ABOUT} (?:of|showing|depicting)\s+",
        rf"(?:a|an) {_LOOK}{_ABOUT} (?:of|showing|depicting|featuring)\s+",
        r"(?:we|you) (?:can )?see\s+(?:that\s+)?",
    )
)  # fmt: skip
_MARKUP = re.compile(r"\*\*|__|`|^\s*(?:#+|[-*•]|\d+[.)])\s+", re.MULTILINE)
_NO_LETTER = "\ufffd"  # bytes that make none, as at the end of an answer that was cut off
_ENDS = re.compile(r"[.!?。！？…][\"'”’)\]]*(?=\s|$)|[。！？]")


def tidy(answer: str, *, whole: bool = True) -> str:
    """The answer in one line, without control characters, markup, quotes around it and openings.

    Args:
        whole: the model came to an end; else its last sentence is not whole, and goes if there is another.
    """
    text = " ".join(UNSEEN.sub(" ", _MARKUP.sub("", answer)).replace(_NO_LETTER, " ").split())
    if not whole and (ends := list(_ENDS.finditer(text))):
        text = text[: ends[-1].end()]
    before = None
    while text != before:
        before = text
        if in_quotes(text):
            text = text[1:-1].strip()
        for opening in _OPENINGS:
            if found := opening.match(text):
                text = text[found.end() :].strip()
    return text[:1].upper() + text[1:]


def fit(caption: str, tokens: Callable[[str], int], limit: int) -> str:
    """As many whole sentences of a caption as the limit takes; of one that is too long, as many words.

    Args:
        tokens: of a text, the end token included.
    """
    if tokens(caption) <= limit:
        return caption
    ends = [found.end() for found in _ENDS.finditer(caption)]
    words = [found.end() for found in re.finditer(r"\S+", caption)]
    for places in (ends, words, range(1, len(caption))):
        if fitting := _most(caption, places, tokens, limit):
            return fitting
    return ""


def _most(caption: str, places: list[int] | range, tokens: Callable[[str], int], limit: int) -> str:
    """The caption up to the last of these places that the limit takes; empty if there is none."""
    low, high = 0, len(places)  # a longer text never has fewer tokens, but for one or two
    while low < high:
        middle = (low + high) // 2
        if tokens(_end(caption[: places[middle]])) <= limit:
            low = middle + 1
        else:
            high = middle
    return _end(caption[: places[low - 1]]) if low else ""


def _end(text: str) -> str:
    """A text that was cut between words, ended as a sentence."""
    text = text.rstrip()
    return text if _ENDS.search(text[-3:]) else text.rstrip(" ,;:-–—") + "."
