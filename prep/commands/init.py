"""`cogprep init DS`: the lists of a data root, from the clips, captions and pictures that lie in it.

A list that is there is never touched. Where there is a videos.txt already, the other lists are written for its lines.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cogcommon.cli.names import json_text
from cogcommon.cli.terminal import Console
from cogcommon.errors import DataRootError
from cogcommon.media.image import PICTURES, is_picture
from cogcommon.words import counted

from ..dataset.captions_found import Captions, find_captions
from ..dataset.found import CLIPS, FoundFiles, find
from ..dataset.lists import ListFault, check_root, read_list, refuse_address
from ..dataset.new_lists import IMAGES, PROMPTS, VIDEOS, entry_of, next_steps, refuse_output, set_aside, write_list
from ..settings.lists import InitSettings
from ..source.part import file_named

_SHOWN = 4  # names that one line shows


@dataclass(frozen=True)
class Told:
    """What `init` found, wrote and has to say."""

    data_root: str
    clips: int  # different ones
    pictures: int  # that are lines of their own: clips of one frame
    lines: int  # of the lists; more than clips and pictures where some have several captions
    captions: Mapping[str, int]  # clips by where their captions are from
    blank: Sequence[int]  # lines of prompts.txt that are to be filled in, also of one that was there
    images: int  # clips that have a picture of their name
    written: Sequence[str]
    kept: Sequence[str]  # lists that were there
    unlisted: Sequence[str]  # clips that no line of a videos.txt names that was there
    notes: Sequence[str]


def run(settings: InitSettings) -> None:
    """The command: look, write, and say what to do next."""
    told = init(settings.root)
    if settings.json:
        print(json_text(asdict(told)))
    else:
        _show(told, Console(soft_wrap=True))


def init(root: Path) -> Told:
    """Write the lists that are missing.

    Raises:
        DataRootError: there are no clips; a table of captions is damaged; a list is there without the clips' to go by.
    """
    refuse_address(root, "init", "DS")
    check_root(root, named="DS", holds="your clips")
    refuse_output(root)
    kept = [name for name in (VIDEOS, PROMPTS, IMAGES) if os.path.lexists(root / name)]
    if kept and VIDEOS not in kept:
        raise DataRootError(
            f"{kept[0]} is there, but no {VIDEOS}: which clip does its first line belong to?",
            where=str(root),
            fix=f"write {VIDEOS} beside it; or, for new lists: {_anew(root, kept)}",
        )
    try:
        found = find(root)
    except OSError as error:
        raise DataRootError(f"the folder cannot be read: {error.strerror}", where=str(root)) from error
    listed = _listed(root) if kept else []
    entries = listed or [*found.clips, *_pictures(found)]
    if not entries:
        raise _no_clips(found)
    files = _files_of(listed, found.clips)
    captions = find_captions(found, list(files.values()) or entries)
    lines = (
        list(_pair(listed, files, captions))
        if listed
        else [(clip, caption) for clip in entries for caption in captions.of.get(clip, ("",))]
    )
    pictures = {clip for clip, _ in lines if is_picture(Path(clip))}
    images = {clip: image for clip, _ in lines if clip not in pictures and (image := found.image_of(clip))}
    lists = {VIDEOS: [entry_of(clip) for clip, _ in lines], PROMPTS: [caption for _, caption in lines]}
    if all(clip in images for clip, _ in lines):
        lists[IMAGES] = [entry_of(images[clip]) for clip, _ in lines]
    written = [name for name, entries in lists.items() if name not in kept and write_list(root / name, entries)]
    clips = {clip for clip, _ in lines} - pictures
    return Told(
        data_root=str(root),
        clips=len(clips),
        pictures=len(pictures),
        lines=len(lines),
        captions=dict(captions.counts),
        blank=[line for line, caption in enumerate(_captions_in(root)[: len(lines)], 1) if not caption],
        images=len(images),
        written=written,
        kept=kept,
        unlisted=sorted(set(found.clips) - {files.get(clip, clip) for clip in clips}),
        notes=list(_notes(found, captions, len(images), len(clips), kept)),
    )


def _pictures(found: FoundFiles) -> list[str]:
    """Pictures that are lines of their own; none where all clips have a picture, since their pairs are no T2V data."""
    paired = found.clips and all(map(found.image_of, found.clips))
    return [] if paired else found.alone


def _no_clips(found: FoundFiles) -> DataRootError:
    left_out = "; ".join(f"{why}: {_some(names)}" for why, names in found.left_out.items())
    seen = "\n       ".join(filter(None, [str(found.root), left_out and f"left out: {left_out}"]))
    return DataRootError(
        "there are no clips or pictures in this folder",
        where=seen,
        fix=f"name the folder that holds them; clips are files that end in {', '.join(sorted(CLIPS))}; "
        f"pictures in {', '.join(PICTURES)}",
    )


def _listed(root: Path) -> list[str]:
    """The clips of a videos.txt that is there."""
    faults: list[ListFault] = []
    entries = read_list(root, VIDEOS, True, faults) or []
    while entries and not entries[-1]:
        entries.pop()
    if "" in entries:
        faults.append(ListFault(VIDEOS, entries.index("") + 1, "blank line", "blank"))
    if faults or not entries:
        faults = faults or [ListFault(VIDEOS, 0, "the list is empty", "no list")]
        raise DataRootError(
            "the list of clips that is there cannot be used",
            where="\n       ".join([str(root), *map(str, faults)]),
            fix=f"mend it; or, for new lists: {_anew(root, [VIDEOS])}",
        )
    return [entry.removeprefix("./") for entry in entries]


def _captions_in(root: Path) -> list[str]:
    """The lines of prompts.txt as it is now; none where it cannot be read, as `validate` will say."""
    return read_list(root, PROMPTS, False, []) or []


def _files_of(listed: Sequence[str], clips: Sequence[str]) -> dict[str, str]:
    """The file of each line: a line may name a part of it."""
    there = set(clips)
    return {entry: entry if entry in there else file_named(entry) for entry in listed}


def _pair(listed: Sequence[str], files: Mapping[str, str], captions: Captions) -> Iterator[tuple[str, str]]:
    """Lines that are there, each with its clip's caption; a clip of two lines has its second one in the second."""
    before: Counter[str] = Counter()
    for clip in listed:
        several = captions.of.get(files[clip], ("",))
        yield clip, several[min(before[clip], len(several) - 1)]
        before[clip] += 1


def _anew(root: Path, names: Sequence[str]) -> str:
    return set_aside(root, names, "cogprep", "init", root)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN:,} more"


def _notes(found: FoundFiles, captions: Captions, images: int, clips: int, kept: Sequence[str]) -> Iterator[str]:
    """What a person should know of what was found."""
    for why, names in found.left_out.items():
        yield f"left out, {why}: {_some(names)}"
    for name, why in captions.faults.items():
        yield f"no caption from {name}: {why}"
    for table, names in captions.absent.items():
        yield f"{table} names {counted(len(names), 'clip')} not in this folder: {_some(names)}"
    for table, names in captions.differ.items():
        yield f"{table} has another caption for {counted(len(names), 'clip')}, which was not used: {_some(names)}"
    if captions.shared:
        yield f"beside more than one clip of their name, and used for each: {_some(captions.shared)}"
    if found.alone and VIDEOS not in kept:
        said = f"{counted(len(found.alone), 'picture')} of no clip's name: {_some(found.alone)}"
        if _pictures(found):
            yield f"{said}; each is a line, a clip of one frame, which text-to-video models learn from"
        else:
            yield f"in no line, since {IMAGES} pairs each clip with a picture: {said}"
    if 0 < images < clips and IMAGES not in kept:
        yield f"no {IMAGES}: only {images} of {counted(clips, 'clip')} have a picture of their name, and all must"


def _show(told: Told, console: Console) -> None:
    more = f" in {counted(told.lines, 'line')}" if told.lines != told.clips + told.pictures else ""
    counts = {"clip": told.clips, "picture": told.pictures}
    there = " and ".join(counted(count, noun) for noun, count in counts.items() if count)
    console.print(f"{told.data_root}: {there}{more}", style="bold")
    if told.captions:
        said = ", ".join(f"{count:,} from {source}" for source, count in told.captions.items())
        console.print(f"captions: {said}")
    for note in told.notes:
        console.print(note, style="yellow")
    if told.kept:
        console.print(f"there already, and left as they are: {', '.join(told.kept)}")
    if told.unlisted:
        root = Path(told.data_root)
        others = " and ".join(name for name in told.kept if name != VIDEOS) or PROMPTS
        console.print(
            f"in no line of {VIDEOS}: {_some(told.unlisted)}; to add one, write it at the end of {VIDEOS}, and what "
            f"belongs to it at the end of {others}; or all lists anew, without what you have written into them: "
            f"{_anew(root, told.kept)}",
            style="yellow",
        )
    console.print(f"written: {', '.join(told.written)}" if told.written else "nothing to write")
    console.print("")
    lines = _some([f"{line:,}" for line in told.blank])
    blank = f"{counted(len(told.blank), 'line')}: {lines}" if told.blank else ""
    sizes = [size for size, count in (("49x480x720", told.clips), ("1x480x720", told.pictures)) if count]
    sentence, validate = next_steps(Path(told.data_root), blank, sizes)
    console.print(sentence)
    console.print(f"  {validate}", style="bold")
