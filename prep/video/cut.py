"""What is kept of a clip: which frames, and which part of the picture. Pure functions, no files.

The pixel window is worked out in the scaled picture (`Placement`): the source is
scaled once, to whole pixels, and the window is cut out of that. The crop box in
source pixels that records and previews show derives from it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Literal

from cogcommon.errors import ShardError
from cogcommon.files.typed import build
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import CONTRACT_FILE

from ..source.clip import BadClip, ClipFacts, ClipFault

if TYPE_CHECKING:
    from cogcommon.shards.contract import Contract

FrameMode = Literal["auto", "even", "fps", "head", "reference"]
Short = Literal["reject", "repeat"]
Fit = Literal["crop", "stretch", "pad"]
Crop = Literal["center", "random", "top", "bottom"]
HdrMode = Literal["tonemap", "reject"]


@dataclass(frozen=True)
class Cut:
    """How clips are cut in time and space, and whether HDR is taken; part of what identifies a latent.

    ``frames`` is one of

    - ``auto``: the family's own rate from the first frame on where the clip is long
      enough for it, else spread evenly over the whole clip;
    - ``even``: spread evenly, in time, from the first frame to the last;
    - ``fps``: the family's own rate; a clip too short or too slow for it is a fault;
    - ``head``: the first frames, one after the other;
    - ``reference``: ``range(0, n, n // F)[:F]``, as the original guide picks.
    """

    frames: FrameMode = "auto"
    start: float = 0.0  # seconds skipped before picking
    stride: int = 1  # every n-th source frame is a candidate
    short: Short = "reject"
    fit: Fit = "crop"
    crop: Crop = "center"
    seed: int = 42  # of random crops
    hdr: HdrMode = "tonemap"

    @property
    def by_number(self) -> bool:
        """Whether frames are taken by their number, whatever their times."""
        return self.frames in ("head", "reference")

    @classmethod
    def of(cls, contract: Contract) -> Cut:
        """How the clips of a folder were cut.

        Raises:
            ShardError: the contract says what no encode writes.
        """
        settings = contract.settings
        try:
            return build(cls, {field.name: settings[field.name] for field in fields(cls) if field.name in settings})
        except ValueError as error:
            raise ShardError(f"the settings in the contract are damaged: {error}", where=CONTRACT_FILE) from error


@dataclass(frozen=True, slots=True)
class Picked:
    """Indices of the source frames used, ascending, and their mean rate in source time (frames/s)."""

    indices: tuple[int, ...]
    effective_fps: float

    @property
    def repeats(self) -> int:
        """How many of them show the frame before once more."""
        return len(self.indices) - len(set(self.indices))


@dataclass(frozen=True, slots=True)
class Placement:
    """Scale the upright source to ``width`` x ``height``; the picture's corner lies at (``left``, ``top``) of it.

    ``left`` or ``top`` is negative where black is added (``pad``). ``box`` is what is
    kept, in pixels of the upright source: left, top, right, bottom.
    """

    width: int
    height: int
    left: int
    top: int
    box: tuple[int, int, int, int]

    def loss(self, source_width: int, source_height: int) -> float:
        """The share of the source picture that is cut away, 0 to 1."""
        left, top, right, bottom = self.box
        return 1 - (right - left) * (bottom - top) / (source_width * source_height)


def pick_frames(
    times_s: Sequence[float], count: int, cut: Cut, family_fps: float, last_s: float = 0.0
) -> Picked | ClipFault:
    """Choose ``count`` frames of a clip by their times.

    No frame is taken twice, since a frame shown twice would teach the model to stutter, but for two reasons: a
    picture that stays on screen is repeated for as long as it stays (`_show`), and ``cut.short`` is ``repeat``.

    Args:
        times_s: time of every source frame, ascending, seconds.
        count: frames wanted.
        cut: ``start`` and ``stride`` thin the source first; ``frames`` is the mode.
        family_fps: the rate the model was trained at.
        last_s: how long the last source frame stays.
    """
    if count == 1:  # a picture: no time passes in it, whatever is to be skipped of clips
        return Picked((0,), family_fps)
    candidates = range(bisect_left(times_s, times_s[0] + cut.start - 1e-6), len(times_s), cut.stride)
    if not candidates:
        return ClipFault(f"--start {cut.start:g} is past its end ({times_s[-1] - times_s[0]:.2f} s)", kind="start")
    shown = [ShownFrame(index, times_s[index]) for index in candidates]
    if not cut.by_number:
        shown = _show(shown, count, family_fps, times_s[-1] + last_s)
    if len(shown) < count:
        if cut.short == "reject":
            thinned = "" if len(candidates) == len(times_s) else f" after --start and --stride (of {len(times_s)})"
            reason = f"too short: {_frames(len(candidates))}{thinned}, {count} are needed"
            return ClipFault(reason, kind="thinned" if thinned else "short", frames=len(candidates))
        repeated = [*shown, *[shown[-1]] * (count - len(shown))]
        return Picked(tuple(one.index for one in repeated), _rate([one.time_s for one in shown], family_fps))
    times = [one.time_s for one in shown]
    if cut.frames == "head":
        chosen = list(range(count))
    elif cut.frames == "reference":
        chosen = list(range(0, len(times), len(times) // count))[:count]
    else:
        at_speed = [times[0] + index / family_fps for index in range(count)]
        # the last frame stays on screen for one interval; half of it keeps the pick the nearest one
        long_enough = at_speed[-1] <= times[-1] + _interval(times) / 2
        if cut.frames == "fps" and not long_enough:
            return ClipFault(f"too short: {times[-1] - times[0]:.2f} s; {count} frames at {family_fps:g} fps take "
                         f"{(count - 1) / family_fps:.2f} s", kind="brief")  # fmt: skip
        if cut.frames == "even" or not long_enough:
            span = times[-1] - times[0]
            chosen = _nearest(times, [times[0] + span * index / (count - 1) for index in range(count)])
        else:
            chosen = _nearest(times, at_speed)
    rate = _rate([times[index] for index in chosen], family_fps)
    if cut.frames == "fps" and abs(rate / family_fps - 1) > 0.05:
        return ClipFault(f"too slow: its own rate gives {rate:.2f} fps where the model has {family_fps:g}", kind="slow")
    return Picked(tuple(shown[index].index for index in chosen), rate)


@dataclass(frozen=True, slots=True)
class ShownFrame:
    """A source frame that is on screen at a time, in seconds."""

    index: int
    time_s: float


def _show(frames: Sequence[ShownFrame], count: int, family_fps: float, end_s: float) -> list[ShownFrame]:
    """The frames, and one that stays for longer than the model's interval as often as a constant rate would store it.

    That rate is the clip's usual one. A clip that is slower than the model throughout so gives every frame once, and
    plays too fast, which `validate` says. If only a part is slower, the rate is the model's, since frames that lie
    densely elsewhere would otherwise be taken in a row to fill up: slow motion.
    """
    if len(frames) < 2:
        return list(frames)
    gaps = [after.time_s - before.time_s for before, after in pairwise(frames)]
    usual = median(gaps)
    if min(gaps) < 0.5 / family_fps:
        usual = min(usual, 1 / family_fps)
    shown = []
    for frame, gap in zip(frames, [*gaps, end_s - frames[-1].time_s], strict=True):
        stays = round(gap / usual) if gap > 1 / family_fps + 1e-6 else 1
        stays = max(1, min(stays, 8 * count))  # of a gap of hours no more than could be picked
        shown += [ShownFrame(frame.index, frame.time_s + gap * place / stays) for place in range(stays)]
    return shown


def _nearest(times: Sequence[float], targets: Sequence[float]) -> list[int]:
    """For each target the nearest time, moved as little as keeps them distinct and in order."""
    chosen: list[int] = []
    for target in targets:
        after = min(bisect_left(times, target), len(times) - 1)
        before = max(after - 1, 0)
        # equal distance (15 fps from 30) goes to the earlier one, whatever the last bit of a float says
        chosen.append(before if target - times[before] <= times[after] - target + 1e-6 else after)
    for index in range(1, len(chosen)):
        chosen[index] = max(chosen[index], chosen[index - 1] + 1)
    most = len(times)
    for index in reversed(range(len(chosen))):
        most = min(chosen[index], most - 1)
        chosen[index] = most
    return chosen


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def _interval(times: Sequence[float]) -> float:
    return median(after - before for before, after in pairwise(times)) if len(times) > 1 else 0.0


def _rate(times: Sequence[float], default: float) -> float:
    span = times[-1] - times[0]
    return (len(times) - 1) / span if span > 0 else default


def placement_of(width: int, height: int, resolution: Resolution, cut: Cut, key: str) -> Placement:
    """Where the picture of ``resolution`` lies in an upright source of ``width`` x ``height`` square pixels.

    Args:
        key: seeds the random crop together with ``cut.seed``, so the same clip is always cut alike.
    """
    wide, high = resolution.width / width, resolution.height / height
    if cut.fit == "stretch":
        return Placement(resolution.width, resolution.height, 0, 0, (0, 0, width, height))
    if cut.fit == "pad":
        scale = min(wide, high)
        scaled_width = min(resolution.width, max(1, round(width * scale)))
        scaled_height = min(resolution.height, max(1, round(height * scale)))
        left, top = -((resolution.width - scaled_width) // 2), -((resolution.height - scaled_height) // 2)
        return Placement(scaled_width, scaled_height, left, top, (0, 0, width, height))
    scale = max(wide, high)
    scaled_width = max(resolution.width, round(width * scale))
    scaled_height = max(resolution.height, round(height * scale))
    over_x, over_y = scaled_width - resolution.width, scaled_height - resolution.height
    share_x, share_y = _shares(cut, key)
    left, top = int(over_x * share_x), int(over_y * share_y)
    box = (
        round(left / scaled_width * width),
        round(top / scaled_height * height),
        round((left + resolution.width) / scaled_width * width),
        round((top + resolution.height) / scaled_height * height),
    )
    return Placement(scaled_width, scaled_height, left, top, box)


def _shares(cut: Cut, key: str) -> tuple[float, float]:
    """Which share of what is cut away lies left of, and above, the picture."""
    if cut.crop == "random":
        digest = hashlib.sha256(f"{cut.seed}/{key}".encode()).digest()
        return tuple(int.from_bytes(part, "big") / (2**64 - 1) for part in (digest[:8], digest[8:16]))  # type: ignore[return-value]
    return 0.5, {"center": 0.5, "top": 0.0, "bottom": 1.0}[cut.crop]


def buckets_for(buckets: Sequence[Resolution], *, picture: bool) -> Sequence[Resolution]:
    """Those that a picture, or a clip, may go to: pictures to those of one frame, clips to the others.

    Raises:
        BadClip: there is none; the message says which to add.
    """
    fitting = [bucket for bucket in buckets if (bucket.frames == 1) == picture]
    if fitting:
        return fitting
    given, one = " ".join(map(str, buckets)), buckets[0]
    if picture:
        raise BadClip(
            f"a picture is a clip of one frame, and no size is of one: --resolution {given} 1x{one.height}x{one.width} "
            "(of a text-to-video model; the others learn from clips only)",
            "told",
        )
    raise BadClip(
        "a clip, and all sizes are of one frame, which are for pictures: "
        f"--resolution 49x{one.height}x{one.width} {given}",
        "told",
    )


def best_bucket(facts: ClipFacts, buckets: Sequence[Resolution], cut: Cut, family_fps: float) -> Resolution:
    """The bucket that keeps most of a clip.

    In this order: enough frames; most of the picture kept (to 1%); the largest
    picture that needs no upscaling, else the smallest; the most frames for which
    the clip is long enough at the family's rate, else the fewest. Equal ones: the
    first named.
    """
    frames = max(0, round((facts.duration_s - cut.start) * facts.fps)) // cut.stride
    seconds = facts.duration_s - cut.start

    def worth(bucket: Resolution) -> tuple[float, ...]:
        scale = max(bucket.width / facts.width, bucket.height / facts.height)
        kept = bucket.width * bucket.height / (scale * scale * facts.width * facts.height)
        area = bucket.width * bucket.height
        long_enough = (bucket.frames - 1) / family_fps <= seconds
        return (
            frames >= bucket.frames,
            round(kept, 2),
            area if scale <= 1 else -area,
            bucket.frames if long_enough else -bucket.frames,
        )

    return max(buckets, key=worth)
