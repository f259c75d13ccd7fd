"""What to type against a fault of a list or of a clip: one remedy for each kind of fault. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from cogcommon.model.families import Family, Resolution

from ..source.clip import ClipFault, Kind
from .lists import ListFault, ListKind
from .new_lists import IMAGES

_OUT = "take its line out of every list"
_REPEAT = "--short repeat shows the last frame again until there are enough"
_LONGER = "or --frames auto, which takes these too, at another speed"
_OF_CLIPS: Mapping[Kind, str] = {
    "missing": f"mend the path, which begins in the data root, or {_OUT}",
    "empty": f"copy the file anew, or {_OUT}",
    "unreached": "the same command again, once it can be read",
    "no video": f"put a whole video in its place, or {_OUT}",
    "damaged": f"put a whole copy in its place, or {_OUT}; where frames can still be read, "
    "`ffmpeg -i CLIP -crf 16 OUT.mp4` saves them",
    "shape": "make it one shape: ffmpeg -i CLIP -crf 16 OUT.mp4; or name a part",
    "short": f"{_REPEAT}; or {_OUT}",
    "thinned": f"a smaller --start or --stride; or {_REPEAT}; or {_OUT}",
    "brief": f"longer clips, {_LONGER}",
    "slow": f"clips of a higher rate, {_LONGER}",
    "start": f"a smaller --start, or {_OUT}",
    "part": "mend the times behind the # of this line",
    "told": "",
    "other": f"another file in its place, or {_OUT}",
}
_OF_LISTS: Mapping[ListKind, str] = {
    "uncaptioned": "",  # validate's guess says it for all of them
    "blank": "fill it in, or take the line out of every list",
    "no list": "write it: one line a clip, the same order in every list",
    "unpaired": "line n of every list is one sample: find the line that one list has too many, or lacks",
    "unreached": "the same command again, once it can be read",
    "told": "",
    "other": "write the line anew, or take it out of every list",
}
# The kinds of what shards have recorded, where there are words only. All of it could be read, but was not decoded.
_RECORDED: Sequence[tuple[str, Kind]] = (
    (r"too short: (\d+) frames?, ", "short"),
    (r"too short: (\d+) frames? after ", "thinned"),
    (r".*(ffmpeg -i|--resolution)", "told"),
    (r"the picture size changes|the picture is turned another way", "shape"),
)


class Remedies:
    """Remedies for faults of one data root; empty where the fault says its own.

    Args:
        faults: of its clips; a shorter size is named for the shortest of those that have too few frames.
        buckets: the sizes that were asked for, to which that one would be added.
        family: decides which numbers of frames there are.
    """

    def __init__(self, faults: Iterable[ClipFault], buckets: Sequence[Resolution], family: Family) -> None:
        least = min((fault.frames for fault in faults if fault.kind in ("short", "thinned")), default=0)
        self._shorter = _shorter_sizes(least, buckets, family)

    def of_picture(self, fault: ClipFault, listed: bool) -> str:
        """The remedy for a first frame.

        Args:
            listed: in images.txt, which is read because it is there; no other list was asked for.
        """
        without = f"; or remove {IMAGES}: the first used frame of each clip is taken then"
        return self.of(fault) + without * (listed and fault.kind == "missing")

    def of(self, fault: ClipFault | ListFault) -> str:
        """The remedy for one; for one that may be gone the next time, and of no known kind, the next time."""
        if isinstance(fault, ListFault):
            return _OF_LISTS[fault.kind]
        kind: Kind = "unreached" if fault.passing and fault.kind == "other" else fault.kind
        return _OF_CLIPS[kind].replace(_REPEAT, _REPEAT + self._shorter)


def recorded(reason: str) -> ClipFault:
    """The fault of a clip that was rejected when it was decoded, from what its shard's record says."""
    for words, kind in _RECORDED:
        if match := re.match(words, reason):
            return ClipFault(reason, kind=kind, frames=int(match[1]) if kind in ("short", "thinned") else 0)
    return ClipFault(reason, kind="damaged")


def _shorter_sizes(frames: int, buckets: Sequence[Resolution], family: Family) -> str:
    """Sizes of no more frames than the shortest clip has, beside those that were asked for; empty where none is."""
    step = family.frame_step
    fewer = (frames - 1) // step * step + 1
    clips = [bucket for bucket in buckets if bucket.frames > 1]
    if fewer <= step or not clips:
        return ""
    added = dict.fromkeys(Resolution(fewer, one.height, one.width) for one in clips)
    return f"; or a shorter size for them: --resolution {' '.join(map(str, [*buckets, *added]))}"
