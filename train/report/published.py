"""What others may read of a run: names in the place of this machine's paths and addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from cogcommon.model.families import BY_NAME

from ..data.repeats import is_size, split_repeat

_PLACES = ("config", "out", "cache", "cache_size", "nvme", "mirror")  # which mean nothing elsewhere
_TEXTS = ("validate_prompt",)
_CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/")  # how the hub's cache calls owner/name


def published_model(name: str, family: str) -> str:
    """What a base model is called elsewhere: a folder by its own name, or the hub's where it is a copy of that one.

    Args:
        name: `Checkpoint.name`.
    """
    if not name.startswith("/"):
        return name
    if cached := _CACHED.search(name):
        return "/".join(cached.groups())
    own, hub_id = PurePath(name).name, BY_NAME[family].hub_id
    return hub_id if own.lower() == hub_id.rpartition("/")[2].lower() else own


def published_settings(settings: Mapping[str, Any], family: str) -> dict[str, Any]:
    """A run's settings: files and folders of shards by their names, without what says where on a machine.

    Args:
        settings: as config.toml has them.
        family: of the base model.
    """
    shown = {name: value for name, value in settings.items() if name not in _PLACES}
    for name, value in shown.items():
        if name in ("shards", "validate_shards"):
            shown[name] = list(dict.fromkeys(map(_folder, value)))
        elif name == "repeat":
            shown[name] = list(map(_repeat, value))
        elif name == "model":
            shown[name] = published_model(value, family)
        elif name not in _TEXTS:
            shown[name] = [_file(word) for word in value] if isinstance(value, list) else _file(value)
    return shown


def _file(value: Any) -> Any:
    """Of a path, which is absolute (`config.write_config`), the name; another value as it is."""
    return PurePath(value).name if isinstance(value, str) and value.startswith("/") else value


def _folder(word: str) -> str:
    """The folder that a word of ``--shards`` names, or whose tars it does."""
    folder, _, last = word.rstrip("/").rpartition("/")
    if not (last.endswith((".tar", ".parquet")) or set("*?[{") & set(last)):
        folder = word.rstrip("/")
    return folder if folder.startswith("hf://") else PurePath(folder).name


def _repeat(word: str) -> str:
    what, times = split_repeat(word)
    return word if is_size(what) else f"{_folder(what)}={times}"
