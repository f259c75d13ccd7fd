"""What a data set's owner should know before an encode, though none of it stops one. Pure functions."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cogcommon.model.families import Family, Resolution
from cogcommon.model.tokens import cut_at, cut_text

from ..video.cut import Cut
from ..video.decode import Picture
from .lists import Sample
from .probe import Look

_FEW_CLIPS = 25  # what the original guide and users of LoRA call the least
_SPEED = 1.25  # played faster or slower than this, motion no longer looks natural
_MUCH_CUT = 0.35
_ENLARGED = 1.5
_OTHER_SHAPE = 0.03


@dataclass(frozen=True)
class Advice:
    """One kind of oddity, and the lines that have it."""

    kind: str
    what: str
    fix: str  # empty where all is well
    lines: Sequence[tuple[int, str]] = ()  # line of the lists, and its detail


@dataclass(frozen=True, slots=True)
class CaptionCut:
    """A caption that is longer than the model reads."""

    line: int
    tokens: int
    kept: str  # the end of what is read
    lost: str  # the beginning of what is not
    guessed: bool = False  # counted without the tokenizer


@dataclass(frozen=True, slots=True)
class Looked:
    """A usable sample: what its lists say, and what its clip is."""

    sample: Sample
    look: Look
    image: Picture | None = None  # its own first frame (I2V)


def advise(
    looked: Sequence[Looked],
    captions: Sequence[CaptionCut],
    family: Family,
    cut: Cut,
    buckets: Sequence[Resolution],
    turned: Sequence[Resolution],
) -> list[Advice]:
    """Everything worth saying, the gravest first. Of captions that are not written yet, nothing is said.

    Args:
        buckets: the sizes that were asked for.
        turned: the same on their sides, where the model takes them.
    """
    written = [one for one in looked if one.sample.caption]
    found = [
        _few(looked),
        _speed(looked, family, cut),
        _bars(looked),
        _captions(captions, family),
        _quoted(written),
        _twice(written),
        _same_caption(written),
        _much_cut(looked, buckets, turned),
        _other_shape(looked),
        _profile(looked),
        _enlarged(looked),
        _interlaced(looked),
        _hdr(looked),
        _held(looked),
        _variable(looked, cut),
        _several(looked),
        _turned(looked),
    ]
    return [advice for advice in found if advice is not None]


def _of(kind: str, what: str, fix: str, lines: Sequence[tuple[int, str]]) -> Advice | None:
    return Advice(kind, what, fix, lines) if lines else None


def _few(looked: Sequence[Looked]) -> Advice | None:
    clips = len({one.look.facts.sha256 for one in looked})
    if clips >= _FEW_CLIPS:
        return None
    return Advice(
        "few clips", f"{clips} different clips", f"a LoRA learns a style or a subject from {_FEW_CLIPS} or more"
    )


def _speed(looked: Sequence[Looked], family: Family, cut: Cut) -> Advice | None:
    lines = []
    fast, slow = [], []
    for one in looked:
        rate = one.look.picked.effective_fps
        if rate > family.fps * _SPEED:
            lines.append((one.sample.line, f"{rate:.3g} fps, {rate / family.fps:.2g}x slow motion"))
            fast.append(one.look)
        elif rate < family.fps / _SPEED:
            lines.append((one.sample.line, f"{rate:.3g} fps, {family.fps / rate:.2g}x time lapse"))
            slow.append(one.look)
    return _of(
        "speed",
        f"played at {family.fps} fps, the family's rate, these would move too fast or too slowly",
        ", or ".join(dict.fromkeys([*_against_slow_motion(fast, family, cut), *_against_time_lapse(slow, cut)])),
        lines,
    )


def _against_slow_motion(looks: Sequence[Look], family: Family, cut: Cut) -> Iterator[str]:
    """What would help: by their time, frames can be no farther apart than a clip is long."""
    if not looks:
        return
    lasts = [look.facts.duration_s - cut.start for look in looks]
    if any(last * family.fps >= look.bucket.frames - 1 for last, look in zip(lasts, looks, strict=True)):
        if cut.frames != "auto":
            yield "--frames auto"
        return
    also = " with --frames auto" if cut.by_number else ""
    yield f"longer clips{also}"
    step = family.frame_step
    fewer = int(max(lasts) * family.fps) // step * step + 1
    if fewer > step:
        size = looks[lasts.index(max(lasts))].bucket
        yield f"fewer frames: --resolution {fewer}x{size.height}x{size.width}, which the longest of them fills{also}"


def _against_time_lapse(looks: Sequence[Look], cut: Cut) -> Iterator[str]:
    """What would help: a clip has no more frames a second than its file."""
    if not looks:
        return
    if cut.frames != "auto":
        yield "--frames auto"
    if cut.stride > 1:
        yield f"--stride 1 instead of {cut.stride}"
    if cut.frames == "auto" and cut.stride == 1:
        yield "clips of a higher frame rate"


def _bars(looked: Sequence[Looked]) -> Advice | None:
    lines = []
    for one in looked:
        if one.look.bars_used and one.look.picture is not None:
            left, top, right, bottom = one.look.picture
            lines.append((one.sample.line, f"crop={right - left}:{bottom - top}:{left}:{top}"))
    return _of(
        "black bars", "the model would learn to draw them", "ffmpeg -i CLIP -vf crop=... OUT cuts them off", lines
    )


def _captions(cuts: Sequence[CaptionCut], family: Family) -> Advice | None:
    about = "about " if any(cut.guessed for cut in cuts) else ""
    return _of(
        "long captions",
        f"the model reads {family.text_tokens} tokens; the rest of these is lost",
        "put what matters first, or shorten them",
        [(cut.line, f"{about}{cut.tokens} tokens: ...{cut.kept} | {cut.lost}...") for cut in cuts],
    )


def in_quotes(caption: str) -> bool:
    """Whether a caption stands in quotes as a whole, as tables write it."""
    return len(caption) > 1 and caption[0] + caption[-1] in ('""', "“”", "„“", "«»", "''", "``")


def _quoted(looked: Sequence[Looked]) -> Advice | None:
    return _of(
        "quotes",
        "these captions stand in quotes, which are trained as a part of them",
        "take the quotes out, if a table put them there",
        [(one.sample.line, one.sample.caption) for one in looked if in_quotes(one.sample.caption)],
    )


def _twice(looked: Sequence[Looked]) -> Advice | None:
    groups: dict[tuple[bytes, str], list[Sample]] = defaultdict(list)
    for one in looked:
        groups[one.look.facts.sha256, one.sample.caption].append(one.sample)
    lines = [
        (again.line, f"as line {first.line}" + (f", {first.source}" if again.source != first.source else ""))
        for first, *others in groups.values()
        for again in others
    ]
    return _of("duplicates", "the same clip with the same caption, again", "remove these lines", sorted(lines))


def _same_caption(looked: Sequence[Looked]) -> Advice | None:
    clips = {one.look.facts.sha256 for one in looked}
    plain = {re.sub(r"[\W\d_]+", " ", one.sample.caption.casefold()).strip() for one in looked}
    if len(clips) > 1 and len(plain) == 1:
        return Advice(
            "captions all alike",
            f"{len(clips)} different clips, and nothing but numbers or signs tells their captions apart: "
            f"{looked[0].sample.caption[:60]}",
            "say what each clip shows; what they have in common is then learned with the word that all captions have",
        )
    counts = Counter(caption for caption, _ in {(one.sample.caption, one.look.facts.sha256) for one in looked})
    lines = [(one.sample.line, "") for one in looked if counts[one.sample.caption] > 1]
    return _of("same captions", "different clips with one caption", "say what differs between them", lines)


def _much_cut(looked: Sequence[Looked], buckets: Sequence[Resolution], turned: Sequence[Resolution]) -> Advice | None:
    far = [one.look for one in looked if one.look.loss > _MUCH_CUT]
    better = [
        size
        for size in turned
        if any((look.facts.width > look.facts.height) == (size.width > size.height) for look in far)
    ]
    fix = "a second --resolution of their shape"
    if sizes := [size for size in better if size not in buckets]:
        fix = f"--resolution {' '.join(map(str, [*buckets, *sizes]))}: each clip goes to the shape that fits it best"
    return _of(
        "much cut away",
        "their shape is far from that of the resolution",
        f"{fix}; or --fit pad",
        [
            (one.sample.line, f"{one.look.facts.width}x{one.look.facts.height} loses {one.look.loss:.0%}")
            for one in looked
            if one.look.loss > _MUCH_CUT
        ],
    )


def _other_shape(looked: Sequence[Looked]) -> Advice | None:
    lines = []
    for one in looked:
        if one.image is not None:
            width, height = one.image.width, one.image.height
            facts = one.look.facts
            if abs(width / height / (facts.width / facts.height) - 1) > _OTHER_SHAPE:
                lines.append((one.sample.line, f"image {width}x{height}, clip {facts.width}x{facts.height}"))
    return _of(
        "image of another shape", "it is cropped differently from its clip", "use a frame of the clip itself", lines
    )


def _profile(looked: Sequence[Looked]) -> Advice | None:
    faults = {one.sample.line: (one.sample.source, one.look.facts.profile_fault) for one in looked}
    faults |= {one.sample.line: (one.sample.image, one.image.profile_fault) for one in looked if one.image}
    return _of(
        "colour profile of an image",
        "it cannot be applied, and the colours are taken for sRGB",
        "save the image anew, as sRGB",
        [(line, f"{name}: {fault}") for line, (name, fault) in faults.items() if fault],
    )


def _enlarged(looked: Sequence[Looked]) -> Advice | None:
    lines = [
        (one.sample.line, f"{one.look.facts.width}x{one.look.facts.height}, {one.look.enlarged:.2g}x larger")
        for one in looked
        if one.look.enlarged > _ENLARGED
    ]
    return _of("enlarged", "smaller than the resolution: blur that the model would learn", "larger clips", lines)


def _interlaced(looked: Sequence[Looked]) -> Advice | None:
    lines = [(one.sample.line, "") for one in looked if one.look.facts.interlaced]
    return _of(
        "interlaced",
        "marked as made of two half pictures; if moving edges are combed, the model would learn that",
        "ffmpeg -i CLIP -vf bwdif -crf 16 OUT.mp4 makes a whole picture of each half",
        lines,
    )


def _hdr(looked: Sequence[Looked]) -> Advice | None:
    lines = [(one.sample.line, one.look.facts.colour) for one in looked if one.look.facts.tone_mapped]
    return _of(
        "HDR",
        "their light is mapped to that of SDR, white at 203 cd/m2 (BT.2390)",
        "look at it with cogprep preview; --hdr reject leaves them out",
        lines,
    )


def _held(looked: Sequence[Looked]) -> Advice | None:
    lines = [
        (one.sample.line, f"{one.look.picked.repeats} of {len(one.look.picked.indices)} frames repeat the one before")
        for one in looked
        if one.look.picked.repeats
    ]
    return _of(
        "held pictures",
        "a picture stays for longer than the model's frames are apart, and is repeated as long as it stays",
        "leave such a part out (--start, or a part of the clip: CLIP#t=12.5,18) unless the model should learn it",
        lines,
    )


def _variable(looked: Sequence[Looked], cut: Cut) -> Advice | None:
    lines = [
        (one.sample.line, f"{one.look.facts.fps:.3g} fps on average") for one in looked if one.look.facts.variable_rate
    ]
    if cut.by_number:
        what = f"--frames {cut.frames} takes frames by their number, so motion changes its speed"
        return _of("variable rate", what, "--frames auto, which takes them by their time", lines)
    return _of("variable rate", "frames are picked by their time, so motion keeps its speed", "", lines)


def _several(looked: Sequence[Looked]) -> Advice | None:
    lines = [
        (one.sample.line, f"{one.look.facts.videos}; used is {one.look.facts.width}x{one.look.facts.height}")
        for one in looked
        if one.look.facts.videos > 1
    ]
    return _of("several videos in a file", "the one marked default is used, else the largest", "", lines)


def _turned(looked: Sequence[Looked]) -> Advice | None:
    lines = []
    for one in looked:
        facts = one.look.facts
        said = [f"turned by {facts.rotation} degrees"] if facts.rotation else []
        if facts.sar != 1:
            said.append(f"pixels {facts.sar:.3g} times as wide as high")
        if facts.cropped:
            said.append("cropped, as its container says")
        if said:
            lines.append((one.sample.line, f"{', '.join(said)}: used as {facts.width}x{facts.height}"))
    return _of("turned, stretched or cropped", "used as a player shows them", "", lines)


def cut_captions(samples: Sequence[Sample], tokenizer: object | None, limit: int) -> list[CaptionCut]:
    """The captions that are longer than ``limit`` tokens, end token included, and where each is cut.

    Args:
        tokenizer: the checkpoint's own T5 tokenizer; None guesses (`_guessed_ends`).
    """
    cuts = []
    for sample in samples:
        caption = sample.caption
        guessed = tokenizer is None
        found = cut_at(_guessed_ends(caption), caption, limit) if guessed else cut_text(caption, tokenizer, limit)
        if found:
            cuts.append(CaptionCut(sample.line, found.tokens, found.kept[-20:], found.lost[:20], guessed))
    return cuts


def _guessed_ends(caption: str) -> list[int]:
    """Where each token of a caption ends, by a rule of thumb: one for a mark, and one for every 6 letters of a word."""
    ends = []
    for word in re.finditer(r"\w+|[^\w\s]", caption):
        ends += [min(word.start() + 6 * piece, word.end()) for piece in range(1, 1 + -(-len(word[0]) // 6))]
    return [*ends, len(caption)]
