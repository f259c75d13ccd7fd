"""The source side of a preview: the frame as it was, and what was cut from it. Runs in the pool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogcommon.model.families import Resolution

from ..source.clip import BadClip, ClipFault
from ..video.colour import Pixels
from ..video.cut import Cut
from ..video.decode import Sources, decode
from ..video.still import open_clip

_WHOLE_SIZE = 640  # pixels of the long side of the whole frame


@dataclass(frozen=True)
class SourceView:
    """Uint8 RGB. The box is in source pixels, like ``width`` and ``height``."""

    whole_HWC: Pixels  # the first used frame, upright
    width: int
    height: int
    box: tuple[int, int, int, int]
    frames_FHWC: Pixels  # what went into the VAE


def view_source(
    path: Path, sha256: bytes, resolution: Resolution, cut: Cut, family_fps: float, key: str, count: int
) -> SourceView | ClipFault:
    """Make the first ``count`` frames of a sample again from its clip.

    Args:
        sha256: of the clip when it was encoded.
        key: of the sample; it seeds the random crop.
    """
    try:
        with Sources(path, None) as sources:
            if not sources.clip.is_clip(sha256):
                return ClipFault("the source has changed since it was encoded")
            clip = decode(sources, resolution, cut, family_fps, key)
            if isinstance(clip, ClipFault):
                return clip
            with open_clip(sources.clip) as video:
                width, height = video.display_size
                scale = min(1.0, _WHOLE_SIZE / max(width, height))
                size = max(1, round(width * scale)), max(1, round(height * scale))
                whole_HWC = next(video.frames(clip.indices[:1], *size))
        return SourceView(whole_HWC, width, height, clip.crop_box, clip.frames_FHWC[:count])
    except OSError as error:
        return ClipFault(f"the source cannot be read: {error.strerror}")
    except BadClip as bad:
        return ClipFault("the source is gone") if bad.kind == "missing" else bad.fault()
