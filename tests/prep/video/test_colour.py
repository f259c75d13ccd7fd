"""Our pixels against the known source: pixel format x container x where the file tells its colours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from corpus import FULL, HLG, LIMITED, PQ, ordinary_scheduling

from cogcommon.model.families import Resolution
from cogprep.source.clip import ClipFault
from cogprep.video.cut import Cut
from cogprep.video.decode import Clip, decode_clip

WIDTH, HEIGHT = 192, 64
SIZE = Resolution(9, HEIGHT, WIDTH)
PATCHES = np.array(
    [
        (200, 30, 30), (30, 180, 40), (30, 40, 200), (200, 180, 20),
        (255, 255, 255), (0, 0, 0), (128, 128, 128), (90, 60, 160),
    ],
    np.uint8,
)  # fmt: skip
CLOSE = 2  # of 255
# Kr and Kb of H.273's matrices
WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


@dataclass(frozen=True)
class Told:
    """Colour tags as H.273 numbers; 2, and 0 for the range, are "unspecified"."""

    matrix: int = 2
    range: int = 0
    transfer: int = 2
    primaries: int = 2


NOTHING = Told()
BT709 = Told(1, 1, 1, 1)


def planes(rgb_HWC: np.ndarray, format_: av.VideoFormat, matrix: int, full: bool) -> list[np.ndarray]:
    """The planes of a picture by the formulas of H.273, in floats."""
    bits = format_.components[0].bits
    top, unit = (1 << bits) - 1, 1 << (bits - 8)
    red, green, blue = np.moveaxis(rgb_HWC / 255, 2, 0)
    if format_.is_rgb:
        return [green * top, blue * top, red * top]
    kr, kb = WEIGHTS[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = [(blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))]
    if full:
        return [luma * top, *(c * top + (1 << (bits - 1)) for c in chroma)]
    return [(16 + 219 * luma) * unit, *((128 + 224 * c) * unit for c in chroma)]


def frame_of(rgb_HWC: np.ndarray, name: str, matrix: int, full: bool) -> av.VideoFrame:
    """A frame made of planes that no library converted; packed formats have no matrix to get wrong."""
    height, width = rgb_HWC.shape[:2]
    if name == "pal8":
        palette = np.zeros((256, 4), np.uint8)
        palette[: len(PATCHES)] = np.insert(PATCHES, 0, 255, axis=1)
        indices = np.arange(len(PATCHES), dtype=np.uint8).repeat(width // len(PATCHES))[None].repeat(height, 0)
        return av.VideoFrame.from_ndarray((indices, palette), format="pal8")
    if name in ("rgb24", "rgba", "argb", "bgr0"):
        return av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format=name)
    frame = av.VideoFrame(width, height, name)
    top = (1 << frame.format.components[0].bits) - 1
    values = [np.clip(np.rint(plane), 0, top) for plane in planes(rgb_HWC, frame.format, matrix, full)]
    values.append(np.full((height, width), top))  # alpha
    for plane, value in zip(frame.planes, values if len(frame.planes) != 2 else [values[0]], strict=False):
        small = value[:: height // plane.height, :: width // plane.width].astype(np.uint8 if top < 256 else np.uint16)
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : small.nbytes // plane.height] = np.ascontiguousarray(small).view(np.uint8).reshape(plane.height, -1)
        plane.update(rows.tobytes())
    return frame


LOSSLESS = {
    "libx264": {"qp": "0", "preset": "ultrafast"},
    "libx264rgb": {"qp": "0", "preset": "ultrafast"},
    "libx265": {"x265-params": "lossless=1:log-level=none", "preset": "ultrafast"},
    "libvpx-vp9": {"lossless": "1", "cpu-used": "8"},
    "libvpx": {"crf": "4", "b": "5M"},
    "libsvtav1": {"crf": "1", "preset": "12"},
    "mjpeg": {"qmin": "1", "qmax": "1"},
    "mpeg4": {"qmin": "1", "qmax": "1"},
    "mpeg2video": {"qmin": "1", "qmax": "1"},
    "prores_ks": {"profile": "4"},
}


def write(
    path: Path,
    codec: str,
    format_: str,
    *,
    true: Told,
    bitstream: Told = NOTHING,
    container: Told = NOTHING,
    patches: np.ndarray = PATCHES,
) -> Path:
    """A clip of nine equal frames, its pixels of ``true`` colours, with tags in the bitstream and in the container."""
    patches = patches if "gray" not in format_ else patches[:, :1].repeat(3, 1)
    picture = patches.repeat(WIDTH // 8, 0)[None].repeat(HEIGHT, 0)
    inner = path.with_name(f"inner{path.suffix}")
    with ordinary_scheduling(), av.open(str(inner), "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, format_
        stream.options = LOSSLESS.get(codec, {})
        tag(stream.codec_context, bitstream)
        for index in range(9):
            frame = frame_of(picture, format_, true.matrix, true.range == FULL)
            frame.colorspace, frame.color_range = bitstream.matrix, bitstream.range
            frame.pts = index
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    copy_with_tags(inner, path, container)
    return path


def copy_with_tags(inner: Path, path: Path, container: Told) -> None:
    """The same packets, the container saying only this of their colours."""
    with av.open(str(inner)) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0], opaque=True)
        tag(copy.codec_context, container)
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = copy
                new.mux(packet)


def tag(context: av.VideoCodecContext, told: Told) -> None:
    context.colorspace, context.color_range = told.matrix, told.range
    context.color_trc, context.color_primaries = told.transfer, told.primaries


def decode(path: Path) -> Clip | ClipFault:
    return decode_clip(path, SIZE, Cut(), 8, "key")


# Container, codec, pixel formats, and the places where such a file can tell its colours.
ANYWHERE = ("bitstream", "container", "nowhere")
GRID = [
    ("mp4", "libx264", "yuv420p yuvj420p yuv422p yuv444p yuv420p10le yuv422p10le yuv444p10le", ANYWHERE),
    ("mov", "libx264", "yuv420p", ANYWHERE),
    ("mkv", "libx264", "yuv420p yuv444p10le", ANYWHERE),
    ("avi", "libx264", "yuv420p", ("bitstream", "nowhere")),
    ("ts", "libx264", "yuv420p", ("bitstream", "nowhere")),
    ("flv", "libx264", "yuv420p", ("bitstream", "nowhere")),
    ("mp4", "libx265", "yuv420p yuv420p10le yuv422p10le yuv444p gray", ANYWHERE),
    ("mkv", "libx265", "yuv420p10le gray", ANYWHERE),
    ("webm", "libvpx-vp9", "yuv420p yuv444p", ANYWHERE),
    ("mp4", "libvpx-vp9", "yuv420p", ANYWHERE),
    ("webm", "libvpx", "yuv420p", ("nowhere",)),  # VP8 is BT.601
    ("mkv", "libsvtav1", "yuv420p", ANYWHERE),
    ("mp4", "libsvtav1", "yuv420p10le", ANYWHERE),
    ("avi", "mjpeg", "yuvj420p yuvj444p", ("nowhere",)),  # JFIF is BT.601
    ("avi", "mpeg4", "yuv420p", ("nowhere",)),
    ("mpg", "mpeg2video", "yuv420p yuv422p", ("bitstream", "nowhere")),
    ("mov", "prores_ks", "yuv422p10le yuva444p10le", ANYWHERE),
    ("mov", "png", "rgb24 rgba pal8", ("nowhere",)),
    ("mov", "qtrle", "rgb24 argb", ("nowhere",)),
    ("mkv", "libx264rgb", "rgb24", ("nowhere",)),
    ("mkv", "ffv1", "yuv420p yuva420p yuv411p yuv444p12le gray gray10le gray16le", ("container", "nowhere")),
    ("mkv", "ffv1", "gbrp10le gbrp12le gbrp16le bgr0", ("nowhere",)),
]
ROWS = [
    (container, codec, format_, place)
    for container, codec, formats, places in GRID
    for format_ in formats.split()
    for place in places
]


def row(container: str, codec: str, format_: str, place: str, folder: Path) -> tuple[str, int]:
    """What is decided for one row of the table, and how far our pixels are from the source."""
    full = "j" in format_ or (codec == "ffv1" and place == "nowhere" and "gray" in format_)  # as ffmpeg writes it
    true = Told(1 if place != "nowhere" else 6, FULL if full else LIMITED, 1, 1)
    told = {place: true} if place != "nowhere" else {}
    clip = decode(write(folder / f"a.{container}", codec, format_, true=true, **told))
    assert isinstance(clip, Clip), clip
    expected = PATCHES if "gray" not in format_ else PATCHES[:, :1].repeat(3, 1)
    return clip.colour, int(np.abs(clip.frames_FHWC[4, HEIGHT // 2, 12::24].astype(int) - expected).max())


@pytest.mark.parametrize(("container", "codec", "format_", "place"), ROWS, ids=["-".join(row) for row in ROWS])
def test_our_pixels_are_those_of_the_source(container, codec, format_, place, tmp_path):
    colour, off = row(container, codec, format_, place, tmp_path)
    assert off <= CLOSE, colour
    assert ("(tagged)" in colour) == (place != "nowhere" or codec in ("mjpeg", "libvpx")) or colour.startswith(
        ("rgb", "gray")
    )


HDR_WAYS = [
    (container, codec, place)
    for container, codec in (("mp4", "libx265"), ("mkv", "libx265"), ("mov", "libx264"), ("webm", "libvpx-vp9"))
    for place in ("bitstream", "container")
    if (codec, place) != ("libvpx-vp9", "bitstream")  # VP9 has no place for it
]


# Light in cd/m2 of the display, BT.2020; of HLG at its nominal 1000
LIGHTS = np.array(
    [
        (5, 5, 5), (26, 26, 26), (80, 80, 80), (203, 203, 203),
        (1000, 1000, 1000), (120, 60, 20), (30, 300, 60), (40, 80, 700),
    ],
    np.float64,
)  # fmt: skip


def pq_of(nits: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, equation 5.2."""
    y = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def nits_of(pq: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, equation 4.1."""
    n = pq ** (1 / 78.84375)
    return 10000 * (np.maximum(n - 0.8359375, 0) / (18.8515625 - 18.6875 * n)) ** (1 / 0.1593017578125)


def hlg_of(nits: np.ndarray) -> np.ndarray:
    """BT.2100: the inverse of the display's system gamma of 1.2, then the camera's OETF."""
    display = nits / 1000
    luma = display @ [0.2627, 0.6780, 0.0593]
    scene = display * luma[:, None] ** (1 / 1.2 - 1)
    bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


def sdr_of(nits: np.ndarray, peak: float) -> np.ndarray:
    """What to show of these lights: BT.2087's matrix, BT.2390's EETF to 203 cd/m2 of the strongest colour, BT.1886."""
    to_709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    shown = []
    for light in np.maximum(nits @ np.array(to_709).T, 0):
        top, white = pq_of(np.array(peak)), pq_of(np.array(203.0))
        e, m = pq_of(light.max()) / top, white / top
        ks = 1.5 * m - 0.5
        if e > ks:
            t = (min(e, 1) - ks) / (1 - ks)
            e = (2 * t**3 - 3 * t**2 + 1) * ks + (t**3 - 2 * t**2 + t) * (1 - ks) + (3 * t**2 - 2 * t**3) * m
        shown.append(light / light.max() * nits_of(e * top) / 203)
    return 255 * np.clip(shown, 0, 1) ** (1 / 2.4)


def write_light(path: Path, codec: str, format_: str, transfer: int, *, primaries: int = 9, **where: Told) -> Path:
    hdr = Told(9, LIMITED, transfer, primaries)
    signal = 255 * (pq_of(LIGHTS) if transfer == PQ else hlg_of(LIGHTS))
    return write(path, codec, format_, true=hdr, patches=signal, **dict.fromkeys(where, hdr))


def off_from(clip: Clip | ClipFault, peak: float) -> float:
    assert isinstance(clip, Clip), clip
    return float(np.abs(clip.frames_FHWC[4, HEIGHT // 2, 12::24] - sdr_of(LIGHTS, peak)).max())


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize(("container", "codec", "place"), HDR_WAYS, ids=["-".join(way) for way in HDR_WAYS])
def test_known_light_is_tone_mapped_wherever_hdr_is_told(container, codec, place, transfer, tmp_path):
    format_ = "yuv420p" if codec == "libvpx-vp9" else "yuv420p10le"
    path = write_light(tmp_path / f"a.{container}", codec, format_, transfer, **{place: NOTHING})
    clip = decode(path)
    assert off_from(clip, 1000) <= (CLOSE if "10" in format_ else 8)  # 8 bits of PQ are coarse
    assert f"{'PQ' if transfer == PQ else 'HLG'} up to 1000 cd/m2 tone-mapped to SDR" in clip.colour
    fault = decode_clip(path, SIZE, Cut(hdr="reject"), 8, "key")
    assert isinstance(fault, ClipFault) and fault.refused, fault
    assert "--hdr reject" in fault.reason and "ffmpeg -i CLIP -vf zscale" in fault.reason


def test_the_peak_of_pq_is_that_of_its_mastering_display(tmp_path, monkeypatch):
    display = "master-display=G(8500,39850)B(6550,2300)R(35400,14600)WP(15635,16450)L(40000000,1)"
    monkeypatch.setitem(LOSSLESS, "libx265", {"x265-params": f"lossless=1:log-level=none:{display}"})
    clip = decode(write_light(tmp_path / "a.mp4", "libx265", "yuv444p10le", PQ, bitstream=NOTHING))
    assert "PQ up to 4000 cd/m2" in clip.colour and off_from(clip, 4000) <= CLOSE


def test_hdr_is_told_by_its_mastering_display_alone(tmp_path, monkeypatch):
    display = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1):max-cll=1000,400"
    monkeypatch.setitem(LOSSLESS, "libx265", {"x265-params": f"lossless=1:log-level=none:{display}"})
    path = tmp_path / "a.mp4"
    fault = decode(write(path, "libx265", "yuv420p10le", true=Told(9, LIMITED)))
    assert "HDR, as the mastering display's brightness in it tells" in fault.reason
    # who says SDR beside it has converted it, and forgot to take this out
    assert isinstance(decode(write(path, "libx265", "yuv420p10le", true=BT709, bitstream=BT709)), Clip)


@pytest.mark.parametrize("place", ["bitstream", "container"])
@pytest.mark.parametrize(
    ("told", "name"),
    [
        (Told(8, LIMITED, 1, 1), "YCgCo"),
        (Told(10, LIMITED, 1, 9), "BT.2020, constant luminance"),
        (Told(14, LIMITED, 1, 9), "ICtCp"),
        (Told(1, LIMITED, 8, 1), "linear light"),
        (Told(1, LIMITED, 9, 1), "logarithmic"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_its_name(told, name, place, tmp_path):
    fault = decode(write(tmp_path / "a.mp4", "libx264", "yuv444p", true=BT709, **{place: told}))
    assert isinstance(fault, ClipFault), fault
    assert name in fault.reason
    assert "ffmpeg -i CLIP -vf zscale" in fault.reason


@pytest.mark.parametrize("place", ["bitstream", "container"])
def test_rgb_as_a_matrix_means_nothing_where_the_pixels_are_not_rgb(place, tmp_path):
    rgb, true = Told(0, LIMITED, 1, 1), Told(6, LIMITED)
    clip = decode(write(tmp_path / "a.mkv", "libx264", "yuv420p", true=true, **{place: rgb}))
    assert clip.colour == "bt601 limited (untagged SD)"
    assert np.abs(clip.frames_FHWC[4, HEIGHT // 2, 12::24].astype(int) - PATCHES).max() <= CLOSE


def test_the_bitstream_wins_over_the_container(tmp_path):
    path = tmp_path / "a.mkv"
    clip = decode(write(path, "libx264", "yuv420p", true=BT709, bitstream=BT709, container=Told(6, LIMITED, 6, 6)))
    assert clip.colour == "bt709 limited (tagged)"
    assert np.abs(clip.frames_FHWC[4, HEIGHT // 2, 12::24].astype(int) - PATCHES).max() <= CLOSE


def test_a_wrong_tag_would_be_seen(tmp_path):
    """So that the table above can fail."""
    for wrong in (Told(6, LIMITED, 1, 1), Told(1, FULL, 1, 1)):
        clip = decode(write(tmp_path / "a.mkv", "libx264", "yuv420p", true=BT709, container=wrong))
        assert np.abs(clip.frames_FHWC[4, HEIGHT // 2, 12::24].astype(int) - PATCHES).max() > 10


@pytest.mark.parametrize("top", [1.0, 4.0, float("nan")])
def test_floats_above_white_are_refused(top, tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", 8, options={"strict": "experimental", "level": "4"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "gbrpf32le"
        ramp = np.linspace(0, 1, 96, dtype=np.float32)
        ramp[-1] = top
        for _ in range(9):
            frame = av.VideoFrame(96, 64, "gbrpf32le")
            for plane in frame.planes:
                rows = np.zeros((64, plane.line_size // 4), np.float32)
                rows[:, :96] = ramp
                plane.update(rows.tobytes())
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    clip = decode(path)
    if top == 1:
        assert isinstance(clip, Clip), clip
        row = clip.frames_FHWC[0, 5, :, 0]
        assert np.abs(row - np.linspace(0, 255, len(row))).max() <= 3
    else:
        assert isinstance(clip, ClipFault)
        assert f"go up to {top:g}, where 1 is white; to clip them there: ffmpeg" in clip.reason
