"""What to type against a fault of a list or of a clip: one remedy for each kind of fault. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from cogcommon.model.families import Family, Resolution

_OUT = "take its line out of every list"
_HAS_ONE = re.compile(r"ffmpeg -i|--resolution|; to |: type |save the list|: take it out|download it first|--hdr")
_SHORT = re.compile(r"too short: (\d+) frames?\b(.*), \d+ are needed")
# By the words that a reason has; the first that fits.
_REMEDIES: Sequence[tuple[str, str]] = (
    (r"no caption yet", ""),  # validate's guess says it for all of them
    (r"blank line", "fill it in, or take the line out of every list"),
    (r"the list is", "write it: one line a clip, the same order in every list"),
    (r"unpaired from here", "line n of every list is one sample: find the line that one list has too many, or lacks"),
    (r"is missing", f"mend the path, which begins in the data root, or {_OUT}"),
    (r"empty", f"copy the file anew, or {_OUT}"),
    (r"too short: .* take ", "longer clips, or --frames auto, which takes these too, at another speed"),
    (r"too slow", "clips of a higher rate, or --frames auto, which takes these too, at another speed"),
    (r"--start .* past its end", f"a smaller --start, or {_OUT}"),
    (r"#t=|begins at or past|holds no picture", "mend the times behind the # of this line"),
    (r"not a video|no video in it|only sound", f"put a whole video in its place, or {_OUT}"),
    (
        r"cut short|incomplete|damaged|cannot be decoded",
        f"put a whole copy in its place, or {_OUT}; where frames can still be read, "
        "`ffmpeg -i CLIP -crf 16 OUT.mp4` saves them",
    ),
    (r"picture size changes|turned another way", "make it one shape: ffmpeg -i CLIP -crf 16 OUT.mp4; or name a part"),
    (r"cannot be read|could not be reached|out of memory|took longer", "the same command again, once it can be read"),
)


def remedies(reasons: Iterable[str], buckets: Sequence[Resolution], family: Family) -> Mapping[str, str]:
    """A remedy for each reason; empty where the reason says its own.

    Args:
        buckets: the sizes that were asked for, to which a shorter one may be added.
        family: decides which numbers of frames there are.
    """
    reasons = set(reasons)
    lengths = [int(match[1]) for match in map(_SHORT.match, reasons) if match]
    shorter = _shorter_sizes(min(lengths), buckets, family) if lengths else ""
    return {reason: _remedy(reason, shorter) for reason in reasons}


def _remedy(reason: str, shorter: str) -> str:
    if short := _SHORT.match(reason):
        repeat = f"--short repeat shows the last frame again until there are enough{shorter}; or {_OUT}"
        return f"a smaller --start or --stride; or {repeat}" if short[2] else repeat
    if _HAS_ONE.search(reason):
        return ""
    return next((fix for words, fix in _REMEDIES if re.search(words, reason)), f"another file in its place, or {_OUT}")


def _shorter_sizes(frames: int, buckets: Sequence[Resolution], family: Family) -> str:
    """Sizes of no more frames than the shortest clip has, beside those that were asked for; empty where none is."""
    step = family.frame_step
    fewer = (frames - 1) // step * step + 1
    clips = [bucket for bucket in buckets if bucket.frames > 1]
    if fewer <= step or not clips:
        return ""
    added = dict.fromkeys(Resolution(fewer, one.height, one.width) for one in clips)
    return f"; or a shorter size for them: --resolution {' '.join(map(str, [*buckets, *added]))}"
