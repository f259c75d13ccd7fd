"""A decoded frame made what a player shows: upright, in RGB of the right matrix and range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from .clip import BadClip

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# AVColorSpace and AVColorTransferCharacteristic, ITU-T H.273.
_RGB, _BT709, _UNSPECIFIED, _FCC, _BT470BG, _SMPTE170M, _SMPTE240M, _BT2020 = 0, 1, 2, 4, 5, 6, 7, 9
_MATRICES = {
    _BT709: ("bt709", Colorspace.ITU709),
    _FCC: ("fcc", Colorspace.FCC),
    _BT470BG: ("bt601", Colorspace.ITU601),
    _SMPTE170M: ("bt601", Colorspace.ITU601),
    _SMPTE240M: ("smpte240m", Colorspace.SMPTE240M),
    _BT2020: ("bt2020", Colorspace.BT2020),
}
_HDR = {16: "PQ, SMPTE 2084", 18: "HLG, ARIB STD-B67"}


@dataclass(frozen=True)
class Colour:
    """How stored numbers become RGB, and how we know."""

    matrix: Colorspace
    range: ColorRange
    decision: str


@dataclass(frozen=True)
class Turn:
    """From the stored picture to the upright one: transpose first, then mirror."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False
    degrees: int = 0  # clockwise, for the record

    def apply(self, pixels_HWC: Pixels) -> Pixels:
        turned = pixels_HWC.swapaxes(0, 1) if self.transpose else pixels_HWC
        return turned[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


def colour_of(frame: VideoFrame) -> Colour:
    """Matrix and range of a clip. Tags are trusted; without them the size decides.

    Raises:
        BadClip: HDR, which needs tone mapping that we do not do.
    """
    if frame.color_trc in _HDR:
        raise BadClip(
            f"HDR ({_HDR[frame.color_trc]}): the colours would come out flat and grey; convert it to SDR first"
        )
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    range_ = ColorRange.JPEG if full else ColorRange.MPEG
    words = "full" if full else "limited"
    if any(component.is_alpha for component in frame.format.components):
        words += ", alpha over black"
    if frame.format.is_rgb or frame.format.has_palette or frame.colorspace == _RGB:
        return Colour(Colorspace.DEFAULT, ColorRange.JPEG, f"rgb {words.replace('limited', 'full')}")
    if frame.colorspace in _MATRICES:
        name, matrix = _MATRICES[frame.colorspace]
        return Colour(matrix, range_, f"{name} {words} (tagged)")
    # Cameras and editors leave HD untagged and mean BT.709; swscale alone would take BT.601.
    if frame.height > 576 or frame.width >= 1280:
        return Colour(Colorspace.ITU709, range_, f"bt709 {words} (untagged HD)")
    return Colour(Colorspace.ITU601, range_, f"bt601 {words} (untagged SD)")


def turn_of(frame: VideoFrame) -> Turn:
    """The display matrix of a frame as a transpose and two mirrors.

    The matrix maps a stored point (x, y), y downward, to (a x + c y, b x + d y);
    ISO/IEC 14496-12, 8.3.2. A phone held upright writes a quarter turn.

    Raises:
        BadClip: an angle between quarter turns.
    """
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Turn()
    a, b, _u, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if not b and not c and a and d:
        return Turn(mirror_x=a < 0, mirror_y=d < 0, degrees=180 if a < 0 and d < 0 else 0)
    if not a and not d and b and c:
        return Turn(transpose=True, mirror_x=c < 0, mirror_y=b < 0, degrees=90 if b > 0 else 270)
    raise BadClip(f"turned by {-frame.rotation} degrees; only quarter turns can be undone")


def to_rgb(scaler: VideoReformatter, frame: VideoFrame, width: int, height: int, colour: Colour) -> Pixels:
    """Scale and convert in one pass: (height, width, 3) uint8 RGB, alpha laid over black as players do."""
    alpha = any(component.is_alpha for component in frame.format.components)
    scaled = scaler.reformat(
        frame,
        width=width,
        height=height,
        format="rgba" if alpha else "rgb24",
        src_colorspace=colour.matrix,
        src_color_range=colour.range,
        dst_color_range=ColorRange.JPEG,
        interpolation=_SCALER,
        threads=1,
    )
    rgb: Pixels = scaled.to_ndarray().astype(np.uint8, copy=False)
    if alpha:
        opacity = rgb[..., 3:].astype(np.uint16)
        return ((rgb[..., :3] * opacity + 127) // 255).astype(np.uint8)
    return rgb
