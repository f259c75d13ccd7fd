"""One reader of still pictures: every mode becomes what a viewer shows, or is refused in words."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from cogcommon.media.image import (
    BadImage,
    ProfileWarning,
    is_animation,
    is_picture,
    read_upright,
    scale_to_cover,
    show_upright,
)

RAMP = np.linspace(0, 1, 64)[None].repeat(32, 0)  # black to white


def saved(path, levels, **options):
    Image.fromarray(levels).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("8 bits.png", np.rint(RAMP * 255).astype(np.uint8)),
        ("16 bits.png", np.rint(RAMP * 65535).astype(np.uint16)),
        ("16 bits.tif", np.rint(RAMP * 65535).astype(np.uint16)),
        ("32 bits, 8 used.tif", np.rint(RAMP * 255).astype(np.int32)),
        ("32 bits, 16 used.tif", np.rint(RAMP * 65535).astype(np.int32)),
        ("32 bits.tif", np.rint(RAMP * (2**31 - 1)).astype(np.int32)),
        ("floats.tif", RAMP.astype(np.float32)),
    ],
)
def test_every_depth_is_scaled_and_none_is_clipped(name, levels, tmp_path):
    image = read_upright(saved(tmp_path / name, levels))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 1] - np.rint(RAMP * 255)).max() <= 1


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_a_picture_and_an_animation_where_it_moves(tmp_path):
    still, moving = tmp_path / "a.avif", tmp_path / "b.AVIF"
    pictures = [Image.new("RGB", (64, 32), colour) for colour in ("red", "blue")]
    pictures[0].save(still)
    pictures[0].save(moving, save_all=True, append_images=pictures[1:])
    assert is_picture(still) and is_picture(moving)
    assert [is_animation(io.BytesIO(path.read_bytes())) for path in (still, moving)] == [False, True]
    assert np.abs(np.asarray(read_upright(still)).astype(int) - (255, 0, 0)).max() <= 4


def test_a_dark_16_bit_png_stays_dark(tmp_path):
    """Its white is that of 16 bits, not the brightest value in it."""
    image = read_upright(saved(tmp_path / "night.png", np.rint(RAMP * 200).astype(np.uint16)))
    assert np.asarray(image).max() <= 1


@pytest.mark.parametrize("levels", [RAMP * 3, RAMP - 0.5, np.where(RAMP > 0.5, np.nan, RAMP)])
def test_floats_without_a_known_white_are_refused(levels, tmp_path):
    path = saved(tmp_path / "a.tif", levels.astype(np.float32))
    with pytest.raises(BadImage, match="save it with 8 or 16 bits"):
        read_upright(path)


def test_the_command_for_floats_above_white_works(tmp_path):
    path = saved(tmp_path / "a.tif", (RAMP * 3).astype(np.float32))
    with pytest.raises(BadImage) as refused:
        read_upright(path)
    code = str(refused.value).split('python -c "')[1].removesuffix('"')
    exec(code.replace("'IMAGE'", repr(str(path))).replace("'OUT.png'", repr(str(tmp_path / "b.png"))))
    assert np.abs(np.asarray(read_upright(tmp_path / "b.png"))[..., 0] - RAMP * 255).max() <= 1


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "16 bits"])
def test_alpha_is_laid_over_black(kind, tmp_path):
    """The hidden colour is white; what is seen is a gray of 90 on the right."""
    path = tmp_path / "a.png"
    levels = np.full((8, 16), 255, np.uint8)
    levels[:, 8:] = 90
    alpha = np.where(levels == 255, 0, 255).astype(np.uint8)
    if kind == "16 bits":
        Image.fromarray(levels.astype(np.uint16) * 257).save(path, transparency=65535)
    else:
        gray = Image.fromarray(np.dstack([levels, alpha]), "LA")
        gray.convert(kind if kind != "P" else "RGBA").save(path)
        if kind == "P":
            Image.open(path).quantize(8).save(path)
    shown = np.asarray(read_upright(path))
    assert shown[:, :8].max() == 0
    assert np.abs(shown[:, 8:].astype(int) - 90).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation, suffix, tmp_path):
    upright = np.zeros((48, 96, 3), np.uint8)
    upright[:24, :48] = 255
    # how a camera held this way stores it: the inverse of what a viewer does
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {274: orientation}} if suffix == "tif" else {"exif": exif.tobytes()}
    shown = np.asarray(read_upright(saved(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), **options)))
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).mean() < 3


def test_what_is_no_picture_is_refused_in_words(tmp_path):
    def reason(path):
        with pytest.raises(BadImage) as caught:
            read_upright(path)
        assert str(tmp_path) not in str(caught.value)
        return str(caught.value)

    header = b"IHDR" + struct.pack(">IIBBBBB", 15000, 13000, 8, 0, 0, 0, 0)
    (tmp_path / "scan.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )  # fmt: skip
    assert reason(tmp_path / "scan.png") == "it has more than 178 megapixels; scale it down"
    assert reason(tmp_path / "none.png") == "the file is missing"
    assert reason(tmp_path) == "a folder, not a file"
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in reason(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("not a picture")
    assert reason(tmp_path / "text.png") == "not a picture"
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(99))
    assert "a HEIC picture" in reason(tmp_path / "phone.jpg") and "open('IMAGE')" in reason(tmp_path / "phone.jpg")
    whole = saved(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert "damaged, or cut short" in reason(tmp_path / "cut.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp"])
def test_damage_raises_nothing_else(suffix, tmp_path):
    """40 files with flipped bytes each: a picture or a reason."""
    picture = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    whole = saved(tmp_path / f"a.{suffix}", picture).read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(40):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        (tmp_path / f"b.{suffix}").write_bytes(bytes(data))
        try:
            assert read_upright(tmp_path / f"b.{suffix}").mode == "RGB"
        except BadImage as bad:
            assert str(bad)


def test_scaling_to_cover_keeps_the_shape_and_the_middle():
    wide = Image.new("RGB", (400, 100), "black")
    wide.paste("white", (190, 40, 210, 60))
    covered = np.asarray(scale_to_cover(wide, 96, 64))[..., 0] > 127
    rows, columns = np.nonzero(covered)
    assert covered.shape == (64, 96)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
    assert (rows.mean(), columns.mean()) == pytest.approx((31.5, 47.5), abs=1)


def swapped_profile() -> bytes:
    """An RGB profile whose red is sRGB's green, and the other way round: its tags for the two change places."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {}
    for entry in range(int.from_bytes(profile[128:132], "big")):
        at = 132 + 12 * entry  # ICC.1:2022, 7.3: signature, offset, size
        places[bytes(profile[at : at + 4])] = at
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12], profile[red + 4 : red + 12],
    )  # fmt: skip
    return bytes(profile)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_the_colours_of_a_profile_become_those_of_srgb(suffix, tmp_path):
    path, stored = tmp_path / f"a.{suffix}", np.zeros((16, 16, 3), np.uint8)
    stored[..., 0] = 200
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(stored).save(path, icc_profile=swapped_profile(), **options)
    shown = np.asarray(read_upright(path)).astype(int)
    assert np.abs(shown - (0, 200, 0)).max() <= 2


def test_alpha_and_a_profile_go_together(tmp_path):
    stored = np.zeros((8, 8, 4), np.uint8)
    stored[...] = 200, 0, 0, 102
    Image.fromarray(stored).save(tmp_path / "a.png", icc_profile=swapped_profile())
    assert np.abs(np.asarray(read_upright(tmp_path / "a.png")).astype(int) - (0, 80, 0)).max() <= 1
    clear = Image.fromarray(np.full((8, 8, 3), (200, 0, 0), np.uint8))
    clear.save(tmp_path / "b.png", icc_profile=swapped_profile(), transparency=(200, 0, 0))
    assert not np.asarray(read_upright(tmp_path / "b.png")).any()


def test_a_profile_of_srgb_changes_nothing(tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(stored).save(tmp_path / "a.png", icc_profile=profile)
    assert (np.asarray(read_upright(tmp_path / "a.png")) == stored).all()
    Image.fromarray(stored[..., 0]).save(tmp_path / "gray.png", icc_profile=profile)
    assert (np.asarray(read_upright(tmp_path / "gray.png")) == stored[..., :1]).all()


@pytest.mark.parametrize("profile", [b"junk" * 50, swapped_profile()[:200]])
def test_a_broken_profile_is_a_warning(profile, tmp_path):
    path, stored = tmp_path / "a.png", np.full((8, 8, 3), 90, np.uint8)
    Image.fromarray(stored).save(path, icc_profile=profile)
    with pytest.warns(ProfileWarning, match="a.png: its colour profile cannot be applied .* taken for sRGB"):
        assert (np.asarray(read_upright(path)) == stored).all()
    with path.open("rb") as file:
        assert show_upright(file)[1]
