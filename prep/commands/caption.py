"""`cogprep caption DS`: fills the blank lines of prompts.txt with what a vision-language model sees in the clips.

A line that is written is never touched. Each caption is in the list as soon as it is there, so the command can be
stopped, run again, or run by several processes on one list.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from cogcommon.cli.names import json_text
from cogcommon.cli.progress import say, stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import DataRootError, ModelError
from cogcommon.model.published import known_checkpoint
from cogcommon.words import counted, in_words

from ..caption.blank_lines import Blank, CaptionList, shared_out
from ..caption.captioner import Captioner, ask_for
from ..caption.frames import Seen, see
from ..caption.words import fit, tidy
from ..dataset.next_steps import next_steps
from ..processes.pool import Pool
from ..settings.lists import CaptionForm, CaptionSettings
from ..source.clip import ClipFault

# What is asked for, of the one or the other "video" or "picture"; and of the model's own tokens at most how many.
_SUBJECT = "who or what is in it and how it looks"
INSTRUCTIONS: Mapping[CaptionForm, str] = {
    "long": f"Describe this {{}} in one paragraph of 80 to 120 words: {_SUBJECT}, what moves and how, where it is, the "
    "light and the colours, and how the camera moves. Begin with the subject. Say only what can be seen. Do not speak "
    "of the {} itself.",
    "short": f"Describe this {{}} in one sentence of at most 25 words: {_SUBJECT}, and what happens. Begin with the "
    "subject. Say only what can be seen. Do not speak of the {} itself.",
}
_TOKENS: Mapping[CaptionForm, int] = {"long": 256, "short": 64}
_SIZE = 448  # pixels of a frame's long side


@dataclass(frozen=True)
class Captioned:
    """What was done. Lines are of the list of captions, from 1."""

    data_root: str
    model: str
    written: int
    left: int  # lines that are blank still
    taken: int  # lines that somebody else wrote meanwhile
    faults: Sequence[tuple[int, str, str]]  # line, what the list says there, why it has no caption
    seconds: float


def run(settings: CaptionSettings) -> None:
    """The command: caption, and say what was done and what comes next."""
    try:
        done = caption(settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; what is in {settings.root / settings.prompts} stays: the same command goes on"
        ) from None
    if settings.json:
        print(json_text(asdict(done)))
    else:
        _show(settings, done, Console(soft_wrap=True))
    if done.faults and not done.written:
        line, entry, why = done.faults[0]
        raise DataRootError(
            f"none of the {counted(len(done.faults), 'blank line')} could be filled; the first: {why}",
            where=f"{settings.root}: {settings.videos}:{line} {entry}",
            fix="mend what is listed above, and run the same command again",
        )


def caption(settings: CaptionSettings) -> Captioned:
    """Fill the blank lines.

    Raises:
        DataRootError: the lists are missing, or do not pair up.
        ModelError: one of the two models cannot be had or used.
        DiskError: the list cannot be written.
    """
    begun = time.perf_counter()
    captions = CaptionList(settings.root, settings.prompts, settings.videos)
    blanks = captions.blanks()
    written = taken = 0
    faults: list[tuple[int, str, str]] = []
    if blanks:
        ask_for(settings.model)  # without it, nothing else helps
        shorten = _shortener(settings)  # the small files first: a missing model is told before a large one is read
        captioner = Captioner(settings.model)
        if captioner.device.type == "cpu":
            say(f"there is no GPU here: {settings.model} runs on the CPU, which takes minutes a clip")
        with captions.working() as number, stage("captioning", len(blanks), "clip") as bar:
            for blank, seen in _look(settings, captions, shared_out(blanks, number)):
                if seen is None:
                    taken += 1
                elif isinstance(seen, ClipFault):
                    faults.append((blank.line, blank.entry, seen.reason))
                elif text := shorten(captioner, seen, blank):
                    filled = captions.fill(blank, text)
                    written, taken = written + filled, taken + (not filled)
                else:
                    faults.append((blank.line, blank.entry, "the model had nothing to say of it"))
                bar.advance()
    return Captioned(
        data_root=str(settings.root),
        model=settings.model,
        written=written,
        left=len(captions.blanks()),
        taken=taken,
        faults=sorted(faults),
        seconds=time.perf_counter() - begun,
    )


def _look(
    settings: CaptionSettings, captions: CaptionList, blanks: Sequence[Blank]
) -> Iterator[tuple[Blank, Seen | ClipFault | None]]:
    """Each line with what is seen of its clip, decoded ahead; None where there is nothing to fill any more."""
    with Pool(settings.workers) as pool:
        one = partial(see, count=settings.frames, size=_SIZE)
        for blank, seen in zip(blanks, pool.run(one, ((settings.root / b.entry,) for b in blanks)), strict=True):
            yield blank, seen if captions.is_blank(blank) else None


def _shortener(settings: CaptionSettings) -> Callable[[Captioner, Seen, Blank], str]:
    """What makes a caption: the model's answer, tidied, with the prefix, within what the family reads."""
    try:
        target = known_checkpoint(settings.target)
        tokenizer = target.load_tokenizer()
    except ModelError as error:
        fix = (error.fix or "").replace("--model", "--target")
        why = f"--target {settings.target}, whose tokenizer says how long a caption may be; {error.where}"
        raise ModelError(error.what, where=why, fix=fix) from error
    prefix = " ".join(settings.prefix.split())

    def tokens(text: str) -> int:
        return len(tokenizer(f"{prefix} {text}".strip(), verbose=False)["input_ids"])

    def of(captioner: Captioner, seen: Seen, blank: Blank) -> str:
        asked = settings.instruction or INSTRUCTIONS[settings.form].format(*["picture" if seen.still else "video"] * 2)
        answer, whole = captioner.describe(seen, asked, tokens=_TOKENS[settings.form], seed=blank.before)
        text = fit(tidy(answer, whole=whole), tokens, target.family.text_tokens)
        return f"{prefix} {text}".strip() if text else ""

    return of


def _show(settings: CaptionSettings, done: Captioned, console: Console) -> None:
    prompts = settings.root / settings.prompts
    for line, entry, why in done.faults:
        console.print(f"  {settings.videos}:{line} {entry}: {why}", style="red")
    if not (done.written or done.taken or done.faults):
        console.print(f"nothing to do: {prompts} has no blank line")
    else:
        console.print(
            f"wrote {counted(done.written, 'caption')} into {prompts}, in {in_words(done.seconds)}", style="bold"
        )
    if done.taken:
        console.print(f"{counted(done.taken, 'line')} had been written meanwhile, and stayed as they are")
    if done.left:
        console.print(f"{counted(done.left, 'line')} blank still; the same command tries again")
    elif done.written:
        console.print("read them, and mend what is wrong: the model learns the words that you use. Then:")
        _, validate = next_steps(settings.root, "", settings.prompts, settings.videos)
        console.print(f"  {validate}")
