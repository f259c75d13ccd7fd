"""Decodes a clip as the survey found it, and gives a verdict only on that very content.

A verdict is recorded under the content's hash and stands until the content changes. A file that is
replaced, cut off from its disk or still being copied while a run is on must not get one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cogcommon.model.families import Resolution

from ..source.clip import BadClip, ClipFault, Hashed
from ..source.source_file import hash_clip, hash_file, unchanged
from ..video.cut import Cut
from ..video.decode import Clip, decode_clip

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
    """As `decode.decode_clip`; a passing fault where the files are not those of the survey.

    Args:
        clip: the file as the survey found it.
        image_sha256: of the image, likewise; not used without one.
    """
    result = decode_clip(path, resolution, cut, family_fps, key, image)
    if isinstance(result, ClipFault) and result.passing:
        return result
    same = _holds(path, clip.sha256, hash_clip) if isinstance(result, ClipFault) else unchanged(path, clip)
    return result if same and (image is None or _holds(image, image_sha256, hash_file)) else _CHANGED


def _holds(path: Path, sha256: bytes, hash_of: Callable[[Path], bytes]) -> bool:
    try:
        return hash_of(path) == sha256
    except (OSError, ValueError, BadClip):
        return False
