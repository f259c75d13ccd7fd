"""What proves that a folder of shards, and each file in it, was made by cogprep.

A folder, by its contract, or by a shard's record. A record, by its header, which says its number and has a hash.
A tar, by its first member, which our writer signs. The rest, by what it says. A name alone proves nothing, but
for temporary names, which nobody else gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from cogcommon.errors import CogError, SettingError, ShardError
from cogcommon.files.atomic import TEMPORARY
from cogcommon.files.hashes import sha256_of
from cogcommon.files.ownership import (
    RECORD_FILE,
    Made,
    entries,
    foreign_folder,
    is_file,
    is_folder,
    record_of,
    refuse_data_root,
)
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE, Contract
from cogcommon.shards.records import number_in_record, shard_number

from .extents import signed

SURVEY = ".survey"  # of an output folder: what was found out about clips
ORIGIN_FILE = "origin.json"
PREVIEW, A_PREVIEW = "preview", "a preview"  # its folder, and what made what is in it
_PAGE = "index.html"  # of a preview
SHARD_TEMPORARY = re.compile(r"\.(\d{6,18})\.(tar\.tmp|tar\.new|parquet\.new)", re.ASCII)
_REPORT = re.compile(r"report(-\d+-of-\d+)?\.json", re.ASCII)
# These tell what the shards are, so they go after the last of them; the one that proves the folder ours, last.
OF_THE_SHARDS = (EMPTY_CAPTION_FILE, ORIGIN_FILE, CONTRACT_FILE)
# What those files say, whatever the version that wrote them.
_SAYS = {"report": {"encoded", "reused", "rejected", "worker"}, "origin": {"data_root", "prompts", "videos"}}


def is_beside_shards(name: str) -> bool:
    """Whether a name is that of a file which tells of a folder of shards: its contract, its origin, a report."""
    return name in OF_THE_SHARDS or _REPORT.fullmatch(name) is not None


def is_ours(path: Path) -> bool:
    """Whether cogprep made a file of an output folder, of OUT/val or of OUT/.survey."""
    name = path.name
    try:
        if not is_file(path):
            return False
        if TEMPORARY.fullmatch(name) or SHARD_TEMPORARY.fullmatch(name):
            return True
        if shard_number(name, "tar") is not None:
            return signed(path)
        if (number := shard_number(name)) is not None:
            return number_in_record(path) == number
        if name == CONTRACT_FILE:
            return _contract(path.parent) is not None
        if name == EMPTY_CAPTION_FILE:
            contract = _contract(path.parent)
            return contract is not None and sha256_of(path) == contract.empty_caption_sha256
        if name == ORIGIN_FILE or _REPORT.fullmatch(name):
            told = json.loads(path.read_bytes())
            return isinstance(told, dict) and _SAYS["origin" if name == ORIGIN_FILE else "report"] <= told.keys()
        return path.parent.name == SURVEY and is_surveyed(path)
    except (OSError, ValueError, RecursionError):
        return False


def is_surveyed(path: Path) -> bool:
    """Whether a file is one of a cache: its name, and the hash of its text in it, say so."""
    if not re.fullmatch(r"[0-9a-f]{32}\.json", path.name) or not is_file(path):
        return False
    digest, _, text = path.read_bytes().partition(b"\n")
    return hashlib.sha256(text).hexdigest().encode() == digest


def preview_record(folder: Path) -> Made | None:
    """The record of a preview's folder; of one that is older than records, what its page and its sheets prove."""
    if os.path.lexists(folder / RECORD_FILE):
        return Made.read(folder)
    from ..show.preview_page import is_page
    from ..show.preview_sheet import is_sheet

    def proves(name: str) -> bool:
        sheet = re.fullmatch(r"sheet-[0-9]+\.png", name)
        return name == _PAGE or (sheet is not None and is_file(folder / name) and is_sheet(folder / name))

    return record_of(folder, A_PREVIEW, proves) if is_file(folder / _PAGE) and is_page(folder / _PAGE) else None


def _contract(folder: Path) -> Contract | None:
    try:
        return Contract.from_json((folder / CONTRACT_FILE).read_bytes(), where="")
    except (OSError, CogError, RecursionError):
        return None


def is_output(out: Path) -> bool:
    """Whether cogprep made a folder of shards: its contract says so, or a shard's record; or it is hardly begun."""
    if is_ours(out / CONTRACT_FILE) or _is_early(out):
        return True
    folders = [folder for folder in (out, out / "val") if folder == out or is_folder(folder)]
    return any(is_ours(path) for folder in folders for path in folder.glob("*.parquet"))


def _is_early(out: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that was killed before it knew the contract."""
    folders = [out, *(out / name for name in ("val", SURVEY))]
    found = [path for folder in folders if folder == out or is_folder(folder) for path in entries(folder)]
    return all(path in folders or path == out / EMPTY_CAPTION_FILE or is_ours(path) for path in found)


def check_shards_output(out: Path, option: str, lists: tuple[str, ...] = ()) -> None:
    """Refuse to write shards where something of somebody's would be written over. Nothing is written.

    Args:
        option: that names the folder, for the message.
        lists: names of the data root's lists, beside the usual ones.

    Raises:
        SettingError: the folder is a data root, or somebody's, or lies behind a link of its own.
        ShardError: a file in it has a name of ours and is not ours.
    """
    refuse_data_root(out, option, lists)
    for part in ("val", SURVEY):
        if os.path.lexists(out / part) and not is_folder(out / part):
            raise SettingError(
                f"{part} is no folder, or a link, and links are not followed",
                where=str(out / part),
                fix="move it elsewhere, or give another --out",
            )
    if not is_output(out):
        raise foreign_folder(out, option)
    for path in entries(out):
        if path.name == ORIGIN_FILE or _REPORT.fullmatch(path.name):
            refuse_foreign(path)


def refuse_foreign(path: Path) -> None:
    """Refuse to replace what somebody put where a file of ours is to lie.

    Raises:
        ShardError: it is there, and not ours.
    """
    if os.path.lexists(path) and not is_ours(path):
        raise ShardError(
            f"{path.name} is not one that cogprep made, and a file of its own is to have this name",
            where=str(path),
            fix="move it elsewhere, or give another --out",
        )
