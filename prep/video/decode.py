"""From a file to the pixels the VAE sees: pick frames, scale, cut."""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from cogcommon.media.image import BadImage, show_upright
from cogcommon.model.families import Resolution

from ..source.clip import BadClip, ClipFault
from ..source.source_file import ClipSource, Source
from .colour import Pixels
from .cut import Cut, Placement, buckets_for, pick_frames, placement_of
from .still import Still, open_clip


@dataclass(frozen=True)
class Clip:
    """A clip as it is encoded: uint8 RGB, upright, at its bucket's size."""

    frames_FHWC: Pixels
    indices: tuple[int, ...]  # source frame of each frame
    effective_fps: float  # of the picked frames, in source time
    crop_box: tuple[int, int, int, int]  # left, top, right, bottom in the upright, square-pixel source
    colour: str
    image_HWC: Pixels | None = None  # the sample's own image (I2V), cut the same way
    profile_fault: str = ""  # of that image, or of the clip that is a picture, see `Picture`


@dataclass(frozen=True, slots=True)
class Picture:
    """What is known of a sample's own image (I2V) once it was read as `decode` reads it."""

    width: int  # upright
    height: int
    profile_fault: str  # why its colours are taken for sRGB, whatever its profile says; empty if they are not


def decode_clip(
    path: Path, resolution: Resolution, cut: Cut, family_fps: float, key: str, image: Path | None = None
) -> Clip | ClipFault:
    """As `decode`, of files."""
    try:
        with Sources(path, image) as sources:
            return decode(sources, resolution, cut, family_fps, key)
    except BadClip as bad:
        return bad.fault()


class Sources(ExitStack):
    """A clip and the sample's own first frame (I2V), opened. Use as a context manager.

    Raises:
        BadClip: one of them cannot be opened.
    """

    def __init__(self, clip: Path, image: Path | None) -> None:
        super().__init__()
        self.clip = self.enter_context(ClipSource(clip))
        try:
            self.image = None if image is None else self.enter_context(_open_image(image))
        except BadClip:
            self.close()
            raise


def decode(sources: Sources, resolution: Resolution, cut: Cut, family_fps: float, key: str) -> Clip | ClipFault:
    """Decode a clip for one bucket: as many of its frames as the bucket has, or the picture that it is.

    Args:
        sources: without an image the caller takes the clip's first frame.
        family_fps: the rate the model was trained at (`cut.pick_frames`).
        key: the sample's key; it seeds the random crop.
    """
    try:
        with open_clip(sources.clip, cut.hdr) as video:
            buckets_for([resolution], picture=isinstance(video, Still))
            if isinstance(video, Still):
                return _decode_still(video, resolution, cut, family_fps, key)
            picked = pick_frames(video.times_s, resolution.frames, cut, family_fps, video.last_s)
            if isinstance(picked, ClipFault):
                return picked
            placement = placement_of(*video.display_size, resolution, cut, key)
            clip_FHWC = np.zeros((resolution.frames, resolution.height, resolution.width, 3), np.uint8)
            slot = 0
            for frame_HWC in video.frames(sorted(set(picked.indices)), placement.width, placement.height):
                _cut(frame_HWC, placement, clip_FHWC[slot])
                repeats = picked.indices.count(picked.indices[slot])
                clip_FHWC[slot + 1 : slot + repeats] = clip_FHWC[slot]
                slot += repeats
            clip = Clip(clip_FHWC, picked.indices, picked.effective_fps, placement.box, video.colour.decision)
            if sources.image is None:
                return clip
            image, fault = _show_upright(sources.image)
            return replace(clip, image_HWC=_cut_image(image, resolution, cut, key), profile_fault=fault)
    except BadClip as bad:
        return bad.fault()


def _decode_still(still: Still, resolution: Resolution, cut: Cut, family_fps: float, key: str) -> Clip:
    image_HWC = _cut_image(still.image, resolution, cut, key)
    box = placement_of(*still.display_size, resolution, cut, key).box
    return Clip(image_HWC[None], (0,), family_fps, box, still.colour, profile_fault=still.profile_fault)


def look_at_picture(path: Path) -> tuple[bytes | ClipFault, Picture | ClipFault]:
    """The content hash of a picture, whatever is in it, and what is in it."""
    try:
        with _open_image(path) as source:
            try:
                image, fault = _show_upright(source)
                return source.sha256, Picture(image.width, image.height, fault)
            except BadClip as bad:
                return source.sha256, bad.fault()
    except BadClip as bad:
        unread = bad.fault()
    except OSError as error:
        unread = ClipFault(f"image: cannot be read: {error.strerror}", kind="unreached")
    return unread, unread


def read_image(path: Path, resolution: Resolution, cut: Cut, key: str) -> Pixels:
    """A picture scaled and cut as its clip is: (height, width, 3) uint8 RGB.

    Raises:
        BadClip: it cannot be read.
    """
    with _open_image(path) as source:
        return _cut_image(_show_upright(source)[0], resolution, cut, key)


def _cut_image(upright: Image.Image, resolution: Resolution, cut: Cut, key: str) -> Pixels:
    placement = placement_of(upright.width, upright.height, resolution, cut, key)
    scaled = upright.resize((placement.width, placement.height), Image.Resampling.BICUBIC)
    image_HWC = np.zeros((resolution.height, resolution.width, 3), np.uint8)
    _cut(np.asarray(scaled), placement, image_HWC)
    return image_HWC


def _open_image(path: Path) -> Source:
    try:
        return Source(path, hashing=True)
    except BadClip as bad:
        raise bad.named("image") from None


def _show_upright(source: Source) -> tuple[Image.Image, str]:
    """See `image.show_upright`."""
    try:
        return show_upright(io.BufferedReader(source.stream()))
    except BadImage as bad:
        raise BadClip(f"image: {bad}") from None


def _cut(scaled_HWC: Pixels, placement: Placement, into_HWC: Pixels) -> None:
    """Copy the picture out of the scaled source; what the source does not cover stays black."""
    height, width = into_HWC.shape[:2]
    top, left = max(placement.top, 0), max(placement.left, 0)
    part = scaled_HWC[top : top + height, left : left + width]
    down, across = max(-placement.top, 0), max(-placement.left, 0)
    into_HWC[down : down + part.shape[0], across : across + part.shape[1]] = part
