"""Prompts and first frames as a person gives them: read, refused, named, and where a model would cut them."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogcommon.errors import SettingError
from cogcommon.files.ownership import state_of
from cogcommon.media.image import BadImage, read_upright, scale_to_cover
from cogcommon.model.tokens import cut_text
from cogcommon.store.address import as_shown
from cogcommon.words import counted

from ..settings.results import SEED

if TYPE_CHECKING:
    from PIL.Image import Image

    from cogcommon.model.checkpoint import Checkpoint
    from cogcommon.model.families import Resolution


@dataclass(frozen=True)
class Prompt:
    """A prompt whose video validation makes.

    Attributes:
        name: of its files: its first words, and a hash of all that the base model's video of it depends on.
        image: the file of its first frame (image-to-video only).
        size: of the video.
    """

    text: str
    name: str
    image: Path | None
    size: Resolution


def validation_prompts(
    given: Sequence[str], file: Path | None, images: Sequence[Path], checkpoint: Checkpoint,
    sizes: Sequence[Resolution], precision: str,
) -> tuple[Prompt, ...]:  # fmt: skip
    """The prompts of --validate-prompt and --validate-prompts, each with its first frame of --validate-image.

    Args:
        images: one for all prompts, or one for each.
        sizes: what the videos may have, as `size_of`.
        precision: that the model computes in.

    Raises:
        SettingError: names the option.
    """
    if not given and file is None:
        return ()
    texts = read_prompts(given, file, "--validate-prompt", once=len(images) < 2)
    family, each = checkpoint.family, list(images)
    if each and family.task == "t2v":
        raise SettingError(
            f"{checkpoint.name} is a text-to-video model; it takes no image",
            where=f"--validate-image {each[0]}",
            fix="leave --validate-image out",
        )
    if family.task == "i2v" and len(each) not in (1, len(texts)):
        raise SettingError(
            f"{checkpoint.name} makes a video of an image; "
            + (f"{len(each)} images were given for {counted(len(texts), 'prompt')}" if each else "none was given"),
            where="--validate-prompt, --validate-image",
            fix="--validate-image FILE: one for all prompts, or one for each, in their order",
        )
    paired: Sequence[Path | None] = each * len(texts) if len(each) == 1 else each or [None] * len(texts)
    of = {path: size_of(path, sizes, "--validate-image") for path in dict.fromkeys(paired)}
    found = (_prompt(text, path, checkpoint, of[path], precision) for text, path in zip(texts, paired, strict=True))
    return tuple(dict.fromkeys(found))


def _prompt(text: str, image: Path | None, checkpoint: Checkpoint, size: Resolution, precision: str) -> Prompt:
    # The fingerprint is the transformer's; where another T5 or VAE stands beside the same one, nobody would know.
    asked = json.dumps([
        text, image and state_of(image), checkpoint.name, checkpoint.fingerprint, str(size), precision, SEED
    ])  # fmt: skip
    return Prompt(text, named_after(text, SEED, asked), image, size)


def without_token(prompts: Sequence[Prompt], token: str, *others: str) -> list[str]:
    """What to know of prompts that lack the word that stands before every caption (--id-token), if there is one.

    Args:
        others: words of other captions; with them, nothing stands before every one.
    """
    lacking = "" if others else lacking_token([prompt.text for prompt in prompts], token)
    said = f"every caption of these shards begins with {token!r}; of --validate-prompt {lacking} does not have it"
    return [said] if lacking else []


def lacking_token(texts: Sequence[str], token: str) -> str:
    """Those that lack a word, in words; empty if none does, or there is no word."""
    lacking = [shortened(text) for text in texts if token not in text]
    return f"{lacking[0]} and {len(lacking) - 1} more" if len(lacking) > 1 else "".join(lacking)


def read_prompts(
    given: Sequence[str], file: Path | None, option: str = "--prompt", *, once: bool = True
) -> list[str]:  # fmt: skip
    """The prompts of an option, and of the lines of the file that its plural names.

    Args:
        once: what is given twice is meant once.

    Raises:
        SettingError: the file cannot be read, or there is no prompt.
    """
    prompts, where = list(given), f"{option}s {file}" if file and not given else option
    if file:
        try:
            prompts += file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(
                f"the prompts cannot be read: {getattr(error, 'strerror', None) or 'they are not UTF-8'}",
                where=f"{option}s {file}",
                fix="a text file (UTF-8) with a prompt in each line",
            ) from error
    found = [prompt for prompt in prompts if prompt.strip()]
    if not found:
        raise SettingError(
            "there is no prompt", where=where, fix=f'{option} "what the video shows", or {option}s FILE'
        )  # fmt: skip
    return list(dict.fromkeys(found)) if once else found


def given_twice(prompts: Iterable[str]) -> Iterator[str]:
    """What to know of prompts that are given more than once, and meant once."""
    for prompt, times in Counter(prompts).items():
        if times > 1:
            yield f"{shortened(prompt)} is given {'twice' if times == 2 else f'{times} times'}; it is drawn once"


def size_of(image: Path | None, sizes: Sequence[Resolution], option: str = "--image") -> Resolution:
    """The size of a video: the first, unless another of these keeps more of its first frame.

    Raises:
        SettingError: the first frame is no picture.
    """
    if image is None:
        return sizes[0]
    upright = _read(image, option)

    def kept(size: Resolution) -> float:
        shapes = size.width * upright.height, size.height * upright.width
        return round(min(shapes) / max(shapes), 2)

    return max(sizes, key=kept)


def read_first_frame(path: Path, size: Resolution, option: str = "--image") -> Image:
    """A picture, scaled to cover the frames of a video and cut, as the encoder does; a pipeline would stretch it.

    Raises:
        SettingError: it is none.
    """
    return scale_to_cover(_read(path, option), size.width, size.height)


def _read(path: Path, option: str) -> Image:
    try:
        return read_upright(path)
    except BadImage as bad:
        raise SettingError(
            f"the image cannot be used: {bad}",
            where=as_shown(path),
            fix=f"{option} FILE, a PNG or JPEG",
        ) from None


def cut_notes(texts: Iterable[tuple[str, str]], checkpoint: Checkpoint) -> Iterator[str]:
    """What to know of texts that are longer than the model reads.

    Args:
        texts: what each is called, and itself.
    """
    limit = int(checkpoint.transformer_config["max_text_seq_length"])
    long = [(name, text) for name, text in texts if 2 * len(text) >= limit]  # no token is less than half a letter
    tokenizer = checkpoint.load_tokenizer() if long else None
    for name, text in long:
        if cut := cut_text(text, tokenizer, limit):
            yield (
                f"{name} has {cut.tokens} tokens, and {checkpoint.family.name} reads {limit}: "
                f'it ends at "...{cut.kept[-30:]}"; this is lost: {shortened(cut.lost, 120)}'
            )


def shortened(prompt: str, most: int = 30) -> str:
    """What a prompt is called in a line for people: at most so many letters of it."""
    return f'"{prompt[:most]}..."' if len(prompt) > most else f'"{prompt}"'


def named_after(prompt: str, seed: int, asked: str) -> str:
    """A name after the prompt in whatever letters, and after all that was asked."""
    letters = unicodedata.normalize("NFC", prompt).lower()
    words = re.sub(r"[\W_]+", "-", letters).strip("-")[:40].rstrip("-")
    digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{words or 'video'}-{seed}-{digest}"
