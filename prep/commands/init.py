"""`cogprep init DS`: the lists of a data root, from the clips, captions and pictures that lie in it.

A list that is there is never touched. Where there is a videos.txt already, the other lists are written for its lines;
with `--add` all lists get lines for what no line names yet, after those that they have.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cogcommon.cli.names import command_line, json_text
from cogcommon.cli.terminal import Console
from cogcommon.errors import DataRootError
from cogcommon.media.image import PICTURES, is_picture
from cogcommon.words import counted

from ..dataset.append import Lists, append_lines
from ..dataset.captions_found import Captions, find_captions
from ..dataset.found import TABLES, FoundFiles, find, split_name
from ..dataset.lists import ListFault, check_root, read_list, refuse_address
from ..dataset.new_lists import IMAGES, PROMPTS, VIDEOS, entry_of, refuse_output, set_aside, sheets_among, write_list
from ..dataset.next_steps import next_steps
from ..settings.lists import InitSettings
from ..source.clip import CLIPS
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
    added: Sequence[str]  # by `--add`: clips and pictures, one a line
    written: Sequence[str]
    kept: Sequence[str]  # lists that were there
    unlisted: Sequence[str]  # clips that no line of a videos.txt names that was there
    notes: Sequence[str]


def run(settings: InitSettings) -> None:
    """The command: look, write, and say what to do next."""
    told = init(settings.root, add=settings.add)
    if settings.json:
        print(json_text(asdict(told)))
    else:
        _show(told, settings.add, Console(soft_wrap=True))


def init(root: Path, *, add: bool = False) -> Told:
    """Write the lists that are missing.

    Args:
        add: if lists are there, append lines for what none names yet.

    Raises:
        DataRootError: there are no clips; a table of captions is damaged; a list is there without the clips' to go by;
            lines are to be added to lists that do not pair up.
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
    if add and kept:
        return _add(root, found, kept)
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
    notes = list(_notes(found, captions, len(images), len(clips), kept))
    if PROMPTS in written and not all(lists[PROMPTS]):
        notes += _not_read(root, found)
    return Told(
        data_root=str(root),
        clips=len(clips),
        pictures=len(pictures),
        lines=len(lines),
        captions=captions.counts(captions.of),
        blank=[line for line, caption in enumerate(_captions_in(root)[: len(lines)], 1) if not caption],
        images=len(images),
        added=(),
        written=written,
        kept=kept,
        unlisted=_unlisted(root, [files.get(clip, clip) for clip in clips], found.clips),
        notes=notes,
    )


def _add(root: Path, found: FoundFiles, kept: Sequence[str]) -> Told:
    """Append lines to the lists that are there."""
    if PROMPTS not in kept:
        raise DataRootError(
            f"there is no {PROMPTS} to add to", where=str(root), fix=f"first `{command_line('cogprep', 'init', root)}`"
        )
    captions = find_captions(found, [*found.clips, *found.alone])
    lacking: list[str] = []

    def choose(lists: Lists) -> Lists:
        files = list(_files_of(lists[VIDEOS], found.clips).values())
        new = _unlisted(root, files, found.clips)
        if IMAGES in lists:
            lacking[:] = [clip for clip in new if not found.image_of(clip)]
            new = [clip for clip in new if found.image_of(clip)]
        else:
            alone = _unlisted(root, files, _pictures(found))
            sheets = sheets_among(alone, lists[VIDEOS])
            new += [picture for picture in alone if picture not in sheets]
        lines = [(clip, caption) for clip in new for caption in captions.of.get(clip, ("",))]
        return {
            PROMPTS: [caption for _, caption in lines],
            IMAGES: [entry_of(found.image_of(clip) or "") for clip, _ in lines],
            VIDEOS: [entry_of(clip) for clip, _ in lines],
        }

    done = append_lines(root, choose)
    added = [entry.removeprefix("./") for entry in done.lists[VIDEOS][len(done.lists[VIDEOS]) - done.lines :]]
    clips = {entry.removeprefix("./") for entry in done.lists[VIDEOS]}
    pictures = {clip for clip in clips if is_picture(Path(clip))}
    notes = list(_notes(found, captions, 0, 0, kept))
    if done.finished:
        notes.append(f"{counted(done.finished, 'line')} of them by a `--add` that was stopped, which is finished now")
    if lacking:
        notes.append(
            f"not added, since {IMAGES} needs a picture of each clip's name: {_some(lacking)}; put them there (a.png "
            f"beside a.mp4), or go without {IMAGES}: {set_aside(root, [IMAGES], 'cogprep', 'init', root, '--add')}"
        )
    return Told(
        data_root=str(root),
        clips=len(clips - pictures),
        pictures=len(pictures),
        lines=len(done.lists[VIDEOS]),
        captions=captions.counts(dict.fromkeys(added)),
        blank=[line for line, caption in enumerate(done.lists[PROMPTS], 1) if not caption],
        images=len(clips - pictures) if IMAGES in done.lists else 0,
        added=added,
        written=[],
        kept=kept,
        unlisted=lacking,
        notes=notes,
    )


def _unlisted(root: Path, listed: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of some files of the folder that no line names, however it names it: with its whole path, or by a link."""
    there, inside = set(names), os.path.abspath(root)  # noqa: PTH100  links stay as typed
    paths = {entry: os.path.normpath(os.path.join(inside, entry)) for entry in set(listed)}  # noqa: PTH118
    named = set(paths.values())
    new = [name for name in names if os.path.join(inside, name) not in named]  # noqa: PTH118
    if not new:
        return []
    elsewhere = {os.path.realpath(path) for entry, path in paths.items() if entry not in there}
    return [name for name in new if os.path.realpath(root / name) not in elsewhere]


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
    if captions.joined:
        yield f"of several lines, which were joined into one caption: {_some(captions.joined)}"
    if found.alone and VIDEOS not in kept:
        said = f"{counted(len(found.alone), 'picture')} of no clip's name: {_some(found.alone)}"
        if _pictures(found):
            yield f"{said}; each is a line, a clip of one frame, which text-to-video models learn from"
        else:
            yield f"in no line, since {IMAGES} pairs each clip with a picture: {said}"
    if 0 < images < clips and IMAGES not in kept:
        yield f"no {IMAGES}: only {images} of {counted(clips, 'clip')} have a picture of their name, and all must"


def _not_read(root: Path, found: FoundFiles) -> Iterator[str]:
    """Tables that may hold the captions that are wanting, and what to type then."""
    for table in found.tables[:1]:
        stem, kind = split_name(table)
        name = stem[: stem.rfind("/") + 1] + f"metadata{TABLES[kind]}"
        if name not in found.metadata:
            again = set_aside(root, [PROMPTS], "cogprep", "init", root).strip("`")
            move = command_line("mv", "-n", root / table, root / name)
            yield f"not read: {_some(found.tables)}; for the captions in {table}: `{move} && {again}`"


def _show(told: Told, add: bool, console: Console) -> None:
    more = f" in {counted(told.lines, 'line')}" if told.lines != told.clips + told.pictures else ""
    counts = {"clip": told.clips, "picture": told.pictures}
    there = " and ".join(counted(count, noun) for noun, count in counts.items() if count)
    console.print(f"{told.data_root}: {there}{more}", style="bold")
    if told.captions:
        said = ", ".join(f"{count:,} from {source}" for source, count in told.captions.items())
        console.print(f"captions: {said}")
    for note in told.notes:
        console.print(note, style="yellow")
    if told.kept and not add:
        console.print(f"there already, and left as they are: {', '.join(told.kept)}")
    if told.unlisted and not add:
        more = command_line("cogprep", "init", told.data_root, "--add")
        console.print(
            f"in no line of {VIDEOS}: {_some(told.unlisted)}; to add them to the lists: {more}", style="yellow"
        )
    if told.added:
        lists = " and ".join(name for name in (PROMPTS, IMAGES, VIDEOS) if name in told.kept)
        first, last = told.lines - len(told.added) + 1, told.lines
        which = f"lines {first:,} to {last:,}" if last > first else f"line {last:,}"
        console.print(f"added to {lists}, {which}: {_some(told.added)}")
    elif add and told.kept:
        console.print("nothing to add")
    else:
        console.print(f"written: {', '.join(told.written)}" if told.written else "nothing to write")
    console.print("")
    lines = _some([f"{line:,}" for line in told.blank])
    blank = f"{counted(len(told.blank), 'line')}: {lines}" if told.blank else ""
    sentence, validate = next_steps(Path(told.data_root), blank)
    console.print(sentence)
    console.print(f"  {validate}", style="bold")
