"""Finds cuts between small pictures. Pure functions of arrays, no files.

A hard cut is a change that stands out from those around it. A dissolve is told by its middle, which is the mean of
the pictures before and after it and has less contrast than either; a picture that only moves keeps its contrast.
What is black or white throughout belongs to no shot, nor does the fade to it or from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Cells = np.ndarray[Any, np.dtype[np.uint8]]  # (N, h, w, 3): N small pictures, each cell the mean of many pixels
Levels = np.ndarray[Any, np.dtype[np.float32]]  # (N,), in units of 1/255
Flags = np.ndarray[Any, np.dtype[np.bool_]]  # (N,)

REACH_S = 3.0  # so far before and after a picture lies all that decides about it

_AROUND_S = 0.4  # a cut stands out from so much on both sides,
_AROUND = 6  # and from so many pictures at least
_OTHERS = 2  # of these so many may change as much: more cuts, or a flash
_CUT = 8.0  # mean difference of two pictures; film grain makes 2, a jump in a drawn film up to 8
_DIM, _DIMMEST = 60.0, 0.3  # in pictures darker than this all differences are smaller, down to this share
LEAST_CUT = _DIMMEST * _CUT  # a smaller change is no cut in any light
_STANDS_OUT = 2.0  # times the change of the pictures around it
_FLASH = 4  # pictures that a flash lasts, or a cut that blends the shots, at most

_HALVES_S = (0.2, 0.4, 0.8)  # of dissolves
_UNLIKE = 8.0  # mean difference of the pictures before and after a dissolve
_BLEND = 0.4  # of it, how far the middle may be from their mean; the shots move meanwhile
_FADED = 0.72  # of their contrast, what the middle has at most

_BLACK, _WHITE = 20, 235  # no cell of a black picture is brighter, none of a white one darker
_FADE_S = 3.0  # the longest fade
_PALER = 1.003  # from one picture of a fade to the next the contrast changes by this factor or more,
_FULL = 0.95  # up to so much of the whole

_STILL_S = 0.5
_STILL = 5.0  # in so much time no cell of a still picture changes by more


@dataclass(frozen=True)
class Cuts:
    """What is known of N pictures in a row."""

    begins: Flags  # with this picture a shot begins
    between: Flags  # it is of a dissolve, and belongs to no shot
    blank: Flags  # it is black or white, or fades to it or from it
    still: Flags  # nothing moves

    def __getitem__(self, pictures: slice) -> Cuts:
        return Cuts(self.begins[pictures], self.between[pictures], self.blank[pictures], self.still[pictures])


def find_cuts(cells_NhwC: Cells, fps: float) -> Cuts:
    """Look at pictures in a row; of those within `REACH_S` of either end it is less certain.

    Args:
        fps: pictures a second.
    """
    gray_NP = cells_NhwC.mean(axis=3, dtype=np.float32).reshape(len(cells_NhwC), -1)
    change = np.concatenate([np.zeros(1, np.float32), differences(cells_NhwC[1:], cells_NhwC[:-1])])
    dim = np.clip(gray_NP.mean(axis=1) / _DIM, _DIMMEST, 1)
    begins, between = _hard(cells_NhwC, change / dim, max(_AROUND, round(_AROUND_S * fps)))
    for first, stop in _dissolves(cells_NhwC, gray_NP, dim, fps):
        if not begins[first : stop + 1].any():
            between[first:stop] = True
            begins[stop] = True
    return Cuts(begins, between, _blank(gray_NP, fps), _still(gray_NP, dim, fps))


def differences(some_hwC: Cells, others_hwC: Cells) -> Levels:
    """Mean absolute difference of two pictures, or of each pair of (N, h, w, 3)."""
    apart = np.maximum(some_hwC, others_hwC) - np.minimum(some_hwC, others_hwC)
    return apart.mean(axis=(-3, -2, -1), dtype=np.float32)


def _hard(cells_NhwC: Cells, change: Levels, around: int) -> tuple[Flags, Flags]:
    """Pictures that are unlike the one before, which those around are not; and those in which two shots blend.

    Args:
        change: from the picture before, as if it were light.
        around: so many pictures before and after are compared.
    """
    windows = sliding_window_view(np.pad(change, around), 2 * around + 1)
    others = np.sort(np.delete(windows, around, axis=1), axis=1)
    cuts: Flags = (change >= _CUT) & (change >= _STANDS_OUT * others[:, -1 - _OTHERS])
    between = np.zeros(len(change), bool)
    for first, second in pairwise(np.flatnonzero(cuts)):
        if second - first <= _FLASH:
            back = differences(cells_NhwC[second], cells_NhwC[first - 1])
            jumps = differences(cells_NhwC[[first, second]], cells_NhwC[[first - 1, second - 1]])
            if back < 0.5 * jumps.min():
                cuts[[first, second]] = False  # the same shot goes on after a flash
            else:
                between[first:second] = True
    return cuts, between


def _dissolves(cells_NhwC: Cells, gray_NP: Levels, dim: Levels, fps: float) -> Iterator[tuple[int, int]]:
    """From the first to past the last picture of each dissolve."""
    count = len(gray_NP)
    contrast = gray_NP.var(axis=1)
    best, half_of = np.zeros(count, np.float32), np.zeros(count, int)
    for half in sorted({max(2, round(seconds * fps)) for seconds in _HALVES_S}):
        if count <= 2 * half:
            break
        before, after, middle = (slice(0, -2 * half), slice(2 * half, None), slice(half, -half))
        unlike = differences(cells_NhwC[after], cells_NhwC[before])
        mean_NP = (gray_NP[before] + gray_NP[after]) / 2
        off = np.abs(gray_NP[middle] - mean_NP).mean(axis=1)
        gray_apart = np.abs(gray_NP[after] - gray_NP[before]).mean(axis=1)
        faded = contrast[middle] < _FADED * (contrast[before] + contrast[after]) / 2
        found = np.where((unlike >= _UNLIKE * dim[middle]) & (off < _BLEND * gray_apart) & faded, unlike, 0)
        wider = found > 1.1 * best[middle]  # of two that end in the same pictures the shorter one
        best[middle][wider], half_of[middle][wider] = found[wider], half
    while (peak := int(best.argmax())) and best[peak]:
        half = int(half_of[peak])
        yield peak - half + 1, peak + half
        best[max(0, peak - 2 * half) : peak + 2 * half] = 0


def _blank(gray_NP: Levels, fps: float) -> Flags:
    """Black or white pictures, and the fades beside them."""
    found = (gray_NP.max(axis=1) < _BLACK) | (gray_NP.min(axis=1) > _WHITE)
    contrast = gray_NP.std(axis=1)
    for edge in np.flatnonzero(np.diff(found.astype(np.int8))):
        step = 1 if found[edge] else -1
        begun = at = edge if found[edge] else edge + 1
        for _ in range(round(_FADE_S * fps)):
            if not 0 <= at + step < len(found) or contrast[at + step] <= contrast[at] * _PALER:
                break
            at += step
        faded = np.arange(begun, at, step)
        found[faded[contrast[faded] < _FULL * contrast[at]]] = True
    return found


def _still(gray_NP: Levels, dim: Levels, fps: float) -> Flags:
    """Pictures from which no cell of the picture a while before differs, or none of that a while after."""
    step = max(1, round(_STILL_S * fps))
    still = np.zeros(len(gray_NP), bool)
    if step < len(gray_NP):
        quiet = np.abs(gray_NP[step:] - gray_NP[:-step]).max(axis=1) <= _STILL * dim[step:]
        still[step:] |= quiet
        still[:-step] |= quiet
    return still
