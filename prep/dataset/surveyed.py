"""Decodes a clip as the survey found it, and gives a verdict only on that very content.

A verdict is recorded under the content's hash and stands until the content changes. A file that is
replaced, cut off from its disk or still being copied while a run is on must not get one.
"""

from __future__ import annotations

from pathlib import Path

from cogcommon.model.families import Resolution

from ..source.clip import BadClip, ClipFault, Hashed
from ..source.remote import Unreached
from ..source.source_file import unchanged
from ..video.cut import Cut
from ..video.decode import Clip, Sources, decode

_CHANGED = ClipFault("the file changed or went out of reach while the run was on", passing=True)


def decode_as_surveyed(
    clip: Hashed,
    image_sha256: bytes,
    path: Path,
    resolution: Resolution,
    cut: Cut,
    family_fps: float,
    key: str,
    image: Path | None = None,
) -> Clip | ClipFault:
    """As `decode.decode`; a passing fault where the files are not those of the survey.

    Args:
        clip: the file as the survey found it.
        image_sha256: of the image, likewise; not used without one.
    """
    try:
        with Sources(path, image) as sources:
            result = decode(sources, resolution, cut, family_fps, key)
            if isinstance(result, ClipFault) and result.passing:
                return result
            same = unchanged(path, clip)
            if isinstance(result, ClipFault):  # read anew, not remembered: the disk may be out of reach
                same = sources.clip.is_clip(clip.sha256)
            return result if same and (sources.image is None or sources.image.sha256 == image_sha256) else _CHANGED
    except Unreached as error:
        return error.fault()
    except (BadClip, OSError):  # it is not there any more, or cannot be read
        return _CHANGED
