"""Chooses the parts of a film that are clips, from what was seen of it. Pure functions, no files."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..source.part import Part
from .cuts import Cuts, Flags
from .film import Film, Stretch

BLACK, DISSOLVES, DAMAGED = "black or white", "dissolves", "not decodable"
SHORT, STILL = "too short", "still"

_DIGITS = 4  # of a second in a list; `Part` forgives half a thousandth
_MOSTLY = 0.8  # of the pictures of a still part nothing moves in so many
_SLACK_S = 1e-6


@dataclass(frozen=True)
class LeftOut:
    """What is left out for one reason."""

    pieces: int = 0
    seconds: float = 0.0

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(self.pieces + other.pieces, self.seconds + other.seconds)


@dataclass(frozen=True)
class Chosen:
    """The parts of a film: as ranges of its pictures, and as a list names them."""

    shots: int
    ranges: Sequence[range]
    parts: Sequence[Part]
    left_out: Mapping[str, LeftOut]


@dataclass(frozen=True)
class Lengths:
    """How long a part may be, in seconds; with ``every_s`` cuts are left alone, and all parts are so long."""

    shortest_s: float
    longest_s: float
    every_s: float | None = None


def choose(film: Film, seen: Sequence[Stretch | range], lengths: Lengths) -> Chosen:
    """Parts between cuts: none goes over a cut, and none holds a black picture.

    Args:
        seen: all stretches of the film in their order; ranges are pictures that could not be decoded.
    """
    damaged, cuts = _joined(len(film.times_s), seen)
    gaps = {DAMAGED: damaged, BLACK: cuts.blank & ~damaged}
    if lengths.every_s is None:
        gaps[DISSOLVES] = cuts.between & ~cuts.blank & ~damaged
    left_out = {why: LeftOut() for why in (*gaps, SHORT, STILL)}
    usable = np.ones(len(film.times_s), bool)
    for why, gap in gaps.items():
        usable &= ~gap
        for run in _runs(gap):
            left_out[why] += LeftOut(1, _length(film, run))
    shots = [shot for run in _runs(usable) for shot in _between(run, cuts.begins, lengths)]
    ranges = []
    for piece in (piece for shot in shots for piece in _divided(film, shot, lengths)):
        length_s = _length(film, piece)
        if length_s < lengths.shortest_s - _SLACK_S:
            left_out[SHORT] += LeftOut(1, length_s)
        elif cuts.still[piece.start : piece.stop].mean() > _MOSTLY:
            left_out[STILL] += LeftOut(1, length_s)
        else:
            ranges.append(piece)
    parts = [Part(round(film.times_s[one.start], _DIGITS), round(_end(film, one), _DIGITS)) for one in ranges]
    return Chosen(len(shots), ranges, parts, {why: left for why, left in left_out.items() if left.pieces})


def _joined(count: int, seen: Sequence[Stretch | range]) -> tuple[Flags, Cuts]:
    """What could not be decoded of a film, and what is known of the rest."""
    damaged = np.zeros(count, bool)
    cuts = Cuts(*(np.zeros(count, bool) for _ in range(4)))
    for stretch in seen:
        if isinstance(stretch, range):
            damaged[stretch.start : stretch.stop] = True
            continue
        place = slice(stretch.first, stretch.first + len(stretch.cuts.begins))
        for name in ("begins", "between", "blank", "still"):
            getattr(cuts, name)[place] = getattr(stretch.cuts, name)
    return damaged, cuts


def _runs(flags: Flags) -> Iterator[range]:
    """Pictures in a row that have the flag."""
    edges = np.flatnonzero(np.diff(np.pad(flags, 1).astype(np.int8)))
    yield from (range(int(first), int(stop)) for first, stop in edges.reshape(-1, 2))


def _between(run: range, begins: Flags, lengths: Lengths) -> Iterator[range]:
    """The shots of pictures in a row."""
    cuts = [] if lengths.every_s else [run.start + int(at) for at in np.flatnonzero(begins[run.start : run.stop])]
    edges = [run.start, *(cut for cut in cuts if cut > run.start), run.stop]
    yield from (range(first, stop) for first, stop in pairwise(edges))


def _divided(film: Film, shot: range, lengths: Lengths) -> Iterator[range]:
    """A shot that is too long, in equal pieces; where they would be too short, in the longest ones and a rest."""
    whole_s = _length(film, shot)
    size_s = lengths.every_s or lengths.longest_s
    count = max(1, math.ceil(whole_s / size_s - _SLACK_S))
    if lengths.every_s is None and whole_s / count >= lengths.shortest_s:
        size_s = whole_s / count
    begin_s = film.times_s[shot.start]
    ends = [bisect_left(film.times_s, begin_s + size_s * place - _SLACK_S) for place in range(1, count)]
    edges = [shot.start, *(end for end in ends if shot.start < end < shot.stop), shot.stop]
    yield from (range(first, stop) for first, stop in pairwise(edges))


def _end(film: Film, pictures: range) -> float:
    return film.times_s[pictures.stop] if pictures.stop < len(film.times_s) else film.length_s


def _length(film: Film, pictures: range) -> float:
    return _end(film, pictures) - film.times_s[pictures.start]
