"""What the words of ``--shards`` stand for: tars, folders, globs, brace ranges and URLs.

What exists is taken literally first, folder by folder: in ``set [v2]/out/*.tar`` only the star is
a pattern where there is a folder called ``set [v2]``.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from cogcommon.errors import ShardError
from cogcommon.files.near import folders_like
from cogcommon.shards.contract import EMPTY_CAPTION_FILE
from cogcommon.store.fsspec_store import open_fsspec
from cogcommon.store.http_faults import NO_LIST
from cogcommon.store.http_store import HttpStore
from cogcommon.store.store import OPENING, Store, StoredFile, is_web, patiently, without_secrets
from cogcommon.words import did_you_mean

from ..store.local_store import LocalStore

_MOST = 1_000_000  # names that one word may stand for
_RANGE = re.compile(r"\{(-?\d{1,4000})\.\.(-?\d{1,4000})(?=\.\.|\})", re.ASCII)
_FILES = (".tar", ".parquet", ".safetensors")
_ADVICE = {
    "--shards": "give the tars that `cogprep encode` wrote, for example --shards out/*.tar",
    "--validate-shards": "`cogprep encode --holdout N` sets samples apart, in out/val/; or leave --validate-shards out",
    "--repeat": "give a folder of --shards, as --repeat out/=8, or a size, as --repeat 1x480x720=8",
}
_LOCAL, _HTTP = LocalStore(), HttpStore()


@dataclass(frozen=True)
class FoundTar:
    """A tar that the words name, and what lies beside it."""

    tar: StoredFile
    record: StoredFile
    empty_caption: StoredFile


def expand(words: Iterable[str], option: str, *, growing: bool = False) -> list[FoundTar]:
    """Every tar that the words name, once each, in order.

    A record or an empty caption behind a URL may be named, too: where each URL is signed by itself,
    the tar's signature does not open them.

    Args:
        growing: look into folders anew; a word that stands for nothing yet is none to complain of.

    Raises:
        ShardError: a word that stands for nothing, or cannot be meant.
        StoreError: a place that cannot be looked into.
    """
    found: dict[str, StoredFile] = {}
    beside: dict[str, StoredFile] = {}  # by name, without signature
    for word in words:
        _check(word, option)
        shown = without_secrets(word)
        files = list(_remote(word, option, growing) if "://" in word else _local(word, option))
        if growing:
            files = [file for file in files if file.remote or file.path.endswith(".tar") or os.path.lexists(file.path)]
        elif not files:
            fix = NO_LIST if is_web(word) else _ADVICE[option]
            raise ShardError(f"no shard matches {shown}", where=option, fix=fix)
        for file in files:
            if file.remote and (file.shown.endswith(".parquet") or file.shown.endswith("/" + EMPTY_CAPTION_FILE)):
                beside[file.shown] = file
                continue
            if not file.shown.endswith(".tar"):
                if not (file.remote or os.path.lexists(file.path)):
                    fix = did_you_mean(folders_like(Path(file.path)), _ADVICE[option])
                    raise ShardError(f"there is no {file.shown}", where=option, fix=fix)
                raise ShardError(
                    f"{file.shown} is not a shard",
                    where=option,
                    fix="give the .tar files; their records lie beside them",
                )
            found.setdefault(file.shown, file)
    if not found and not growing:
        raise ShardError(f"{option} is not given", fix=f"{option} out/*.tar (what `cogprep encode` wrote)")
    pairs = ((tar, tar.beside(".parquet"), tar.sibling(EMPTY_CAPTION_FILE)) for tar in found.values())
    return [FoundTar(tar, *(beside.get(file.shown, file) for file in others)) for tar, *others in pairs]


def unexpanded(words: Sequence[str]) -> list[str]:
    """A command line as it was before a shell put names in the place of ``out/*.tar``.

    Several tars that are only some of a folder's stay, and so does one alone.
    """
    found: list[str] = []
    for folder, together in itertools.groupby(words, _folder_of_tar):
        names = list(together)
        all_there = folder is not None and set(names) == set(_LOCAL.matching(f"{glob.escape(folder)}*.tar"))
        found += [f"{folder}*.tar"] if all_there and len(names) > 1 else names
    return found


def _folder_of_tar(word: str) -> str | None:
    """With its slash; None of what is no name of a local tar."""
    return word[: word.rfind("/") + 1] if word.endswith(".tar") and "://" not in word else None


def can_grow(word: str) -> bool:
    """Whether a word can stand for more shards later: a folder, a pattern or a range, and not one tar."""
    name = word.partition("?")[0] if is_web(word) else word
    return not name.endswith(_FILES) or (any(sign in name for sign in "*[?{") and not os.path.lexists(name))


def _check(word: str, option: str) -> None:
    from_there = f"go into that folder (`cd`) and give a path from there, as {option} '*.tar'; or rename it"
    if not word.strip() or re.search(r"[\x00-\x1f\x7f-\x9f]", word):
        raise ShardError(
            f"{word!r} names no shards: it is empty or holds control characters",
            where=option,
            fix=from_there if word.strip() else f"{option} out/*.tar",
        )
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise ShardError(
            f"{word!r} is not UTF-8, and the run's files could not name it", where=option, fix=from_there
        ) from error


def _local(word: str, option: str) -> Iterator[StoredFile]:
    for name in _literal_first(word, option):
        if _is_folder(name):
            yield from (StoredFile(_LOCAL, tar, tar) for tar in sorted(_LOCAL.names(name)) if tar.endswith(".tar"))
        else:
            yield StoredFile(_LOCAL, name, name)


def _literal_first(word: str, option: str) -> list[str]:
    """Paths that a word stands for; one without any sign stands for itself, there or not."""
    if word.startswith("~") and not os.path.lexists(word.partition("/")[0]):
        word = os.path.expanduser(word)  # noqa: PTH111 nobody of that name is no error
    literal, rest = _existing(word)
    if not rest:
        return [word]
    names = _braces(rest, option)
    if list(names) != [rest]:
        return [path for name in names for path in _literal_first(literal + name, option)]
    if glob.has_magic(rest):
        return sorted(_LOCAL.matching(glob.escape(literal) + rest))
    return [word]


def _existing(word: str) -> tuple[str, str]:
    """A path as the longest part of it that exists, with its slash, and the rest."""
    if os.path.lexists(word):
        return word, ""
    for slash in reversed([match.end() for match in re.finditer("/+", word)]):
        if _is_folder(word[:slash]):
            return word[:slash], word[slash:]
    return "", word


def _is_folder(path: str) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 pathlib raises for a name that is too long


def _braces(text: str, option: str) -> Sequence[str]:
    too_many = ShardError(f"{without_secrets(text)} stands for more than {_MOST:,} names", where=option, fix="fewer")
    # A range is written out before its first name is given.
    if any(abs(int(last) - int(first)) > _MOST for first, last in _RANGE.findall(text)):
        raise too_many
    try:
        names = list(itertools.islice(braceexpand.braceexpand(text, escape=False), _MOST + 1))
    except (ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise ShardError(
            f"{without_secrets(text)} has a brace without its other half",
            where=option,
            fix=f"{option} 'out/{{000000..000007}}.tar'",
        ) from error
    if len(names) > _MOST:
        raise too_many
    return names


def _remote(word: str, option: str, growing: bool) -> Iterator[StoredFile]:
    path, mark, query = word.partition("?") if is_web(word) else (word, "", "")
    for name in _braces(path, option):
        url = name + mark + query
        if url.startswith("file://"):
            yield from _local(url.removeprefix("file://"), option)
            continue
        store: Store = _HTTP
        inside = url
        if not is_web(url):
            store, inside = open_fsspec(url, option)
            if growing:
                store.look_again()
        scheme = "" if is_web(url) else url.partition("://")[0] + "://"
        for match in _matches(store, inside, name, without_secrets(url)):
            yield StoredFile(store, match, without_secrets(scheme + match.lstrip("/")))


def _matches(store: Store, path: str, name: str, shown: str) -> list[str]:
    """What a path in a store stands for: a pattern, a tar, or a folder."""

    def look() -> list[str]:
        pattern = any(sign in name for sign in "*[") or ("?" in name and not is_web(name))
        if pattern and not _is_there(store, path):
            return sorted(store.matching(path))
        if name.endswith(_FILES):
            return [path]
        return sorted(one for one in store.names(path) if one.partition("?")[0].endswith(".tar"))

    try:
        return patiently(look, shown, OPENING)
    except FileNotFoundError:
        return []


def _is_there(store: Store, path: str) -> bool:
    try:
        store.stat(path)
    except FileNotFoundError:
        return False
    return True
