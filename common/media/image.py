"""The one reader of still pictures: the first frames that cogprep encodes and that cogtrain generates from."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..files.regular_file import Unreadable, open_regular

if TYPE_CHECKING:
    from PIL.Image import Image


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")  # how the names of pictures end
HEIC_PICTURES = (".heic", ".heif", ".hif")  # likewise; no library that we have reads them

# How one begins, whatever its name (ISO/IEC 23008-12, annex B): HEIF as such may hold other pictures, too.
_HEIC = re.compile(rb".{4}ftyp(hei[cxms]|mif1.{4}(.{4}){0,8}?hei[cxms])", re.DOTALL)
_BRIGHTEST_WHITE = (
    """python -c "from PIL import Image; """
    """Image.open('IMAGE').point(lambda v: v * FACTOR).convert('L').save('OUT.png')\""""
)


class ProfileWarning(UserWarning):
    """A picture's colour profile is not applied; the message names the picture and says why."""


class BadImage(Exception):
    """The picture cannot be used; the message says why, without its name."""


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, by its name; an animation may be called so, too (`is_animation`)."""
    return path.suffix.lower() in PICTURES


def told_of_heic(begin: bytes, name: str) -> str | None:
    """What to say of a HEIC picture, which iPhones take; None of what is none.

    Args:
        begin: the first bytes of the file.
        name: what stands for the file in the command.
    """
    if not _HEIC.match(begin):
        return None
    return (
        "a HEIC picture, as iPhones take them, which cannot be read here; to convert it: pip install pillow-heif; "
        'python -c "import pillow_heif; pillow_heif.register_heif_opener(); '
        f"from PIL import Image; Image.open('{name}').save('OUT.png')\""
    )


def is_animation(file: BinaryIO) -> bool:
    """Whether a PNG, WebP or AVIF is a row of pictures, shown one after the other; false of what cannot be read."""
    from PIL import Image

    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file, formats=("PNG", "WEBP", "AVIF")) as opened:
            return bool(getattr(opened, "is_animated", False))
    return False


def read_upright(path: Path) -> Image:
    """As `show_upright`, of a file; a profile that cannot be applied is a `ProfileWarning`.

    Raises:
        BadImage: also where the file cannot be opened.
    """
    try:
        file = open_regular(path)
    except Unreadable as error:
        raise BadImage(str(error)) from None
    with io.BufferedReader(file) as opened:
        picture, fault = show_upright(opened)
    if fault:
        said = f"{path}: its colour profile cannot be applied ({fault}); its colours are taken for sRGB"
        warnings.warn(said, ProfileWarning, stacklevel=2)
    return picture


def show_upright(file: BinaryIO) -> tuple[Image, str]:
    """A picture as a viewer shows it: turned by its EXIF orientation, 8-bit sRGB, alpha laid over black.

    16-bit and 32-bit whole numbers and floats are scaled to 8 bits. Colours of an embedded ICC profile become those
    of sRGB, relative to white (ICC.1:2022, 6.2).

    Returns:
        The picture, and why its profile could not be applied; empty if it was, or if there is none.

    Raises:
        BadImage: it cannot be read, is larger than 178 megapixels, or does not say what white is.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a size from half the limit on, of odd metadata
            with Image.open(file) as opened:
                opened.load()
                upright = _in_8_bits(ImageOps.exif_transpose(opened), opened.format or "")
                upright, fault = _in_srgb(upright, opened.info.get("icc_profile"))
                return _over_black(upright), fault
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("it has more than 178 megapixels; scale it down") from None
    except UnidentifiedImageError:
        file.seek(0)
        raise BadImage(told_of_heic(file.read(64), "IMAGE") or "not a picture") from None
    except Exception as error:  # a damaged picture can raise anything inside its decoder
        raise BadImage(f"damaged, or cut short ({error})") from error


def scale_to_cover(image: Image, width: int, height: int) -> Image:
    """Scale a picture so that it just covers ``width`` x ``height``, and cut the middle out of it."""
    from PIL import Image as pillow

    scale = max(width / image.width, height / image.height)
    across, down = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (across - width) // 2, (down - height) // 2
    scaled = image.resize((across, down), pillow.Resampling.BICUBIC)
    return scaled.crop((left, top, left + width, top + height))


def _in_srgb(image: Image, profile: bytes | None) -> tuple[Image, str]:
    """A picture of a colour profile in sRGB, its alpha as it was; as it is with the reason, where that cannot be."""
    from PIL import ImageCms

    if not profile:
        return image, ""
    straight = image
    if image.mode in ("P", "PA") or "transparency" in image.info:  # what is transparent is told by a raw colour
        straight = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    alpha = straight.getchannel("A") if straight.mode in ("LA", "RGBA") else None
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        coloured = theirs.profile.xcolor_space.strip() == "RGB"
        colours = straight.convert({"1": "L", "LA": "L", "RGBA": "RGB"}.get(straight.mode, straight.mode))
        srgb = ImageCms.profileToProfile(
            colours.convert("RGB") if coloured and colours.mode == "L" else colours,
            theirs,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
        )
    except (OSError, ImageCms.PyCMSError) as error:
        return image, str(error)
    assert srgb is not None  # it would be None in place
    if alpha is not None:
        srgb.putalpha(alpha)
    return srgb, ""


def _over_black(image: Image) -> Image:
    from PIL import Image as pillow

    if "A" in image.getbands() or "transparency" in image.info:
        straight = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", straight.size, (0, 0, 0, 255)), straight)
    return image.convert("RGB")


def _in_8_bits(image: Image, format_: str) -> Image:
    """A gray picture of more than 8 bits, scaled; Pillow would clip it. Others as they are."""
    import numpy as np
    from PIL import Image as pillow

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    levels_HW = np.asarray(image).astype(np.float64)
    if not np.isfinite(levels_HW).all() or levels_HW.min() < 0:
        raise BadImage("it has brightnesses below zero or not finite; save it with 8 or 16 bits")
    brightest = levels_HW.max()
    if image.mode == "F":
        white = 1.0
        if brightest > white:
            raise BadImage(
                f"its floats go up to {brightest:.4g}, where 1 is white; save it with 8 or 16 bits; to make its "
                f"brightest white: {_BRIGHTEST_WHITE.replace('FACTOR', f'{255 / brightest:.6g}')}"
            )
    elif image.mode != "I" or format_ in ("PNG", "PPM"):  # older Pillows read 16 bits as mode I
        white = 65535.0
    else:  # 32 bits, of which nearly all writers use fewer: white is the top of as many as the brightest needs
        white = next(top for top in (255.0, 65535.0, 2.0**31 - 1) if brightest <= top)
    key = image.info.get("transparency")
    if isinstance(key, int):
        levels_HW[levels_HW == key] = 0  # transparent, over black
    return pillow.fromarray(np.rint(levels_HW * (255 / white)).astype(np.uint8))
