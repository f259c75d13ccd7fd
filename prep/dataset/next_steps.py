"""What to type once there are lists: the `cogprep validate` that fits the clips, whose options `encode` takes, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cogcommon.cli.names import command_line
from cogcommon.media.image import is_picture
from cogcommon.model.families import BY_NAME, Resolution

from ..source.addresses import remote_address
from ..source.clip import BadClip
from .lists import read_list
from .new_lists import IMAGES, PROMPTS, VIDEOS

_LOOKED_AT = 24  # clips, from all over the list


def next_steps(root: Path, blank: str, prompts: str = PROMPTS, videos: str = VIDEOS) -> tuple[str, str]:
    """A sentence, and the command that it ends in.

    Args:
        blank: the lines of the list of captions that have none, in words; empty: none.
        prompts: name of the list of captions.
        videos: name of the list of clips.
    """
    names = [
        word
        for flag, name, usual in (("--prompts", prompts, PROMPTS), ("--videos", videos, VIDEOS))
        if name != usual
        for word in (flag, name)
    ]
    entries = read_list(root, videos, True, []) or []
    images = (root / IMAGES).is_file()
    takes_images = BY_NAME["5b-i2v"]  # at one size only
    sizes = [takes_images.native] if images else _sizes(root, entries)
    options = [*names, *(("--model", takes_images.hub_id) if images else ()), "--resolution", *map(str, sizes)]
    sentence = "next"
    if blank:
        caption = command_line("cogprep", "caption", root, *names)
        sentence = (
            f"next: write a caption into each blank line of {root / prompts} ({blank}); line n belongs to line n of "
            f"{videos}. Or let a model write them, which takes a GPU: {caption}. Then"
        )
    if images:
        sentence += f", for image-to-video, since {IMAGES} is there"
    return f"{sentence}:", command_line("cogprep", "validate", "--data-root", root, *options)


def _sizes(root: Path, entries: Sequence[str]) -> Iterator[Resolution]:
    """Of text-to-video, for clips and for pictures, in the shapes that are there."""
    native = BY_NAME["5b"].native
    pictures = [entry for entry in entries if is_picture(Path(entry))]
    clips = [entry for entry in entries if not is_picture(Path(entry))]
    if clips or not pictures:
        yield from _turned(native, root, clips)
    if pictures:
        yield from _turned(Resolution(1, native.height, native.width), root, pictures)


def _turned(native: Resolution, root: Path, entries: Sequence[str]) -> list[Resolution]:
    """A size as it is, for clips wider than high, on its side for clips higher than wide, or both."""
    local = [entry for entry in dict.fromkeys(entries) if remote_address(Path(entry)) is None]
    looked_at = [local[at * len(local) // _LOOKED_AT] for at in range(_LOOKED_AT)] if local else []
    from ..video.still import glance  # PyAV, which the lists themselves do without

    high = set[bool]()
    for entry in dict.fromkeys(looked_at):
        try:
            width, height = glance(root / entry)
        except BadClip:
            continue  # `validate` says why
        high.add(height > width)
    return [native.turned if turned else native for turned in sorted(high or {False})]
