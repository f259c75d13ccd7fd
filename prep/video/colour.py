"""A decoded frame made what a player shows: upright, in RGB of the right matrix and range."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from ..source.clip import BadClip, Refused
from .cut import HdrMode
from .hdr import Light, Transfer, light_of, to_sdr

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# AVColorSpace (matrix), AVColorTransferCharacteristic and AVColorPrimaries: the numbers of ITU-T H.273.
_UNSPECIFIED = {2, 3, 255}  # 3 is reserved; 255 comes of a failed look-up in some muxers
_RGB = 0
_MATRICES = {
    1: ("bt709", Colorspace.ITU709),
    4: ("fcc", Colorspace.FCC),
    5: ("bt601", Colorspace.ITU601),
    6: ("bt601", Colorspace.ITU601),
    7: ("smpte240m", Colorspace.SMPTE240M),
    9: ("bt2020", Colorspace.BT2020),
}
# What swscale cannot convert, or takes for something else without a word.
_OTHER_MATRICES = {
    8: "YCgCo",
    10: "BT.2020, constant luminance",
    11: "SMPTE 2085",
    12: "derived from the primaries",
    13: "derived from the primaries, constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
_HDR: dict[int, Transfer] = {16: "PQ", 18: "HLG"}
_NOT_FOR_SCREENS = {8: "linear light", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE 428, for digital cinema"}
# Side data that only HDR has, for a file that has lost its transfer function.
_HDR_SIDE_DATA = {
    "MASTERING_DISPLAY_METADATA": "the mastering display's brightness",
    "CONTENT_LIGHT_LEVEL": "the content's light level",
    "DYNAMIC_HDR_PLUS": "HDR10+",
}
_TO_SDR = (
    "ffmpeg -i CLIP -vf zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p OUT"
)
_DOLBY_TO_SDR = (
    "ffmpeg -i CLIP -vf libplacebo=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv:format=yuv420p OUT"
)
_FROM_FLOATS = (
    "to clip them there: ffmpeg -i CLIP -pix_fmt yuv420p OUT; to map linear light to a screen's: "
    "ffmpeg -i CLIP -vf tonemap=hable,zscale=tin=linear:pin=bt709:t=bt709:m=bt709:p=bt709:r=tv,format=yuv420p OUT"
)
_FLOATS = re.compile(r"f(16|32)(le|be)$")  # names of pixel formats
_WHITE = 1 + 1 / 510  # what still rounds to it in 8 bits
_TO_709 = "ffmpeg -i CLIP -vf zscale=m=bt709:r=tv,format=yuv420p OUT"

# A gray picture of limited range, made full; swscale takes every gray for full.
_GRAY_FULL = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Tags:
    """What a file says of its colours, as H.273 numbers; range is 0 and the others are 2 where it says nothing."""

    range: int = 0
    primaries: int = 2
    transfer: int = 2
    matrix: int = 2

    @classmethod
    def of(cls, told: VideoFrame | VideoCodecContext) -> Tags:
        """Of a decoded frame: what its bitstream says. Of a stream not decoded yet: what its container says."""
        return cls(int(told.color_range), int(told.color_primaries), int(told.color_trc), int(told.colorspace))

    def filled_from(self, other: Tags) -> Tags:
        """These, and where they say nothing what the other says."""
        return Tags(
            self.range or other.range,
            *(
                theirs if mine in _UNSPECIFIED else mine
                for mine, theirs in (
                    (self.primaries, other.primaries),
                    (self.transfer, other.transfer),
                    (self.matrix, other.matrix),
                )
            ),
        )


@dataclass(frozen=True)
class Colour:
    """How stored numbers become RGB, and how we know."""

    matrix: Colorspace
    range: ColorRange
    decision: str
    gray_limited: bool = False
    light: Light | None = None  # of HDR


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


def colour_of(frame: VideoFrame, container: Tags, hdr: HdrMode = "tonemap") -> Colour:
    """Matrix and range of a clip, and of HDR its light. Tags are trusted; without them the size decides.

    Args:
        container: what the container says; it fills what the bitstream leaves open, as in a player.

    Raises:
        Refused: HDR, if that is to be rejected.
        BadClip: HDR that cannot be tone-mapped, or floats above white; a matrix that cannot be undone.
    """
    tags = _tags_of(frame, container)
    if tags.transfer in _HDR:
        return _hdr_colour(frame, tags, _HDR[tags.transfer], hdr)
    _refuse_unknown_light(frame, tags)
    _refuse_above_white(frame)
    full = tags.range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    gray = frame.format.name.startswith(("gray", "ya8", "ya16"))
    if gray and not tags.range:
        full = True  # as ffmpeg writes it
    range_ = ColorRange.JPEG if full else ColorRange.MPEG
    words = "full" if full else "limited"
    if any(component.is_alpha for component in frame.format.components):
        words += ", alpha over black"
    if _is_rgb(frame):
        return Colour(Colorspace.DEFAULT, ColorRange.JPEG, f"rgb {words.replace('limited', 'full')}")
    if gray:
        return Colour(Colorspace.DEFAULT, ColorRange.JPEG, f"gray {words}", gray_limited=not full)
    if tags.matrix in _MATRICES:
        name, matrix = _MATRICES[tags.matrix]
        return Colour(matrix, range_, f"{name} {words} (tagged)")
    # Cameras and editors leave HD untagged and mean BT.709; swscale alone would take BT.601.
    if frame.height > 576 or frame.width >= 1280:
        return Colour(Colorspace.ITU709, range_, f"bt709 {words} (untagged HD)")
    return Colour(Colorspace.ITU601, range_, f"bt601 {words} (untagged SD)")


def _hdr_colour(frame: VideoFrame, tags: Tags, transfer: Transfer, hdr: HdrMode) -> Colour:
    """Of PQ and HLG, which are BT.2020 where they do not say otherwise."""
    if hdr == "reject":
        raise Refused(f"HDR ({transfer}), which --hdr reject refuses; to make it SDR: {_TO_SDR}")
    if frame.format.name.startswith(("gray", "ya")) or any(one.is_alpha for one in frame.format.components):
        raise BadClip(f"HDR ({transfer}) in gray or with alpha; to make it SDR: {_TO_SDR}", "told")
    if tags.matrix in _OTHER_MATRICES and not _is_rgb(frame):
        raise BadClip(
            f"HDR ({transfer}), its colours coded as {_OTHER_MATRICES[tags.matrix]}; to make it SDR: {_TO_SDR}",
            "told",
        )
    light = light_of(frame, transfer, tags.primaries)
    if _is_rgb(frame):
        return Colour(Colorspace.DEFAULT, ColorRange.JPEG, f"rgb full, {light}", light=light)
    full = tags.range == ColorRange.JPEG
    name, matrix = _MATRICES.get(tags.matrix, _MATRICES[9])
    told = f"{name} {'full' if full else 'limited'}"
    return Colour(matrix, ColorRange.JPEG if full else ColorRange.MPEG, f"{told}, {light}", light=light)


def _is_rgb(frame: VideoFrame) -> bool:
    return frame.format.is_rgb or frame.format.has_palette


def _tags_of(frame: VideoFrame, container: Tags) -> Tags:
    """The tags of a frame, filled from the container. "RGB" on a format that is not RGB is no matrix."""
    tags = Tags.of(frame)
    if not _is_rgb(frame):
        tags, container = (replace(told, matrix=2) if told.matrix == _RGB else told for told in (tags, container))
    return tags.filled_from(container)


def _refuse_unknown_light(frame: VideoFrame, tags: Tags) -> None:
    """Refuse what a plain conversion would show in wrong colours, saying how to convert it."""
    if tags.transfer in _UNSPECIFIED:
        if frame.side_data.get("DOVI_METADATA") is not None:
            raise BadClip(
                f"HDR (Dolby Vision): its colours would come out wrong; to make it SDR: {_DOLBY_TO_SDR}", "told"
            )
        for name, what in _HDR_SIDE_DATA.items():
            if frame.side_data.get(name) is not None:
                raise BadClip(
                    f"HDR, as {what} in it tells, but which kind it does not say; if it is PQ: "
                    + _TO_SDR.replace(
                        "-vf ", "-vf setparams=color_primaries=bt2020:color_trc=smpte2084:colorspace=bt2020nc,"
                    ),
                    "told",
                )
    if tags.transfer in _NOT_FOR_SCREENS:
        raise BadClip(
            f"its brightness is not made for a screen ({_NOT_FOR_SCREENS[tags.transfer]}); to convert it: "
            "ffmpeg -i CLIP -vf zscale=t=bt709:m=bt709:r=tv,format=yuv420p OUT",
            "told",
        )
    if tags.matrix in _OTHER_MATRICES and not _is_rgb(frame):
        raise BadClip(f"its colours are coded as {_OTHER_MATRICES[tags.matrix]}; to convert it: {_TO_709}", "told")


def _refuse_above_white(frame: VideoFrame) -> None:
    """Refuse floats that swscale would clip without a word: above 1, which is white, or not a number."""
    kind = _FLOATS.search(frame.format.name)
    if kind is None:
        return
    sample = np.dtype(f"{'>' if kind[2] == 'be' else '<'}f{int(kind[1]) // 8}")
    wide = frame.width * (1 if frame.format.is_planar else len(frame.format.components))
    planes: Any = frame.planes[:3]  # a fourth is alpha; as buffers their type stubs do not know them
    for plane in planes:
        rows = np.frombuffer(plane, sample).reshape(-1, plane.line_size // sample.itemsize)[: frame.height, :wide]
        if not (top := float(rows.max())) <= _WHITE:
            raise BadClip(f"its floats go up to {top:.4g}, where 1 is white; {_FROM_FLOATS}", "told")


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
    """Scale and convert in one pass: (height, width, 3) uint8 RGB, alpha laid over black as players do.

    HDR is scaled as it is stored, and then tone-mapped.
    """
    if colour.light is not None:
        return _reformat(scaler, frame, width, height, colour, _SCALER)
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
    if colour.gray_limited:
        rgb[..., :3] = _GRAY_FULL[rgb[..., :3]]
    if alpha:
        opacity = rgb[..., 3:].astype(np.uint16)
        return ((rgb[..., :3] * opacity + 127) // 255).astype(np.uint8)
    return rgb


def sketch(scaler: VideoReformatter, frame: VideoFrame, width: int, height: int, colour: Colour) -> Pixels:
    """A small RGB picture quickly: of all the pixels that one of its covers, four are looked at."""
    return _reformat(scaler, frame, width, height, colour, Interpolation.FAST_BILINEAR)


def _reformat(
    scaler: VideoReformatter,
    frame: VideoFrame,
    width: int,
    height: int,
    colour: Colour,
    interpolation: Interpolation,
) -> Pixels:
    scaled: Any = scaler.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24" if colour.light is None else "rgb48le",
        src_colorspace=colour.matrix,
        src_color_range=colour.range,
        dst_color_range=ColorRange.JPEG,
        interpolation=interpolation,
        threads=1,
    ).to_ndarray()
    return scaled.astype(np.uint8, copy=False) if colour.light is None else to_sdr(scaled, colour.light)
