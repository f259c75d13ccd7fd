"""``config.toml``, the settings of a run as ``--config`` reads them; and as JSON, for what a run writes of itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.names import command_line
from cogcommon.errors import RunError
from cogcommon.files.ownership import Made
from cogcommon.store.store import without_secrets

from ..data.repeats import is_size, split_repeat
from .folder import CONFIG_FILE, FACTS_FILE, read_settings

if TYPE_CHECKING:
    from ..settings.training import TrainSettings
    from .run import Run


def settings_json(settings: TrainSettings) -> dict[str, Any]:
    """The settings as JSON values; URLs have lost what signs them, since people share what a run writes."""
    plain = dataclasses.asdict(settings)
    plain |= {name: [without_secrets(word) for word in plain[name]] for name in ("shards", "validate_shards")}
    plain["repeat"] = [_repeat_without_secrets(word) for word in settings.repeat]
    del plain["json"]  # it says how a command answers, not what is trained
    plain["mirror"] = settings.mirror and without_secrets(settings.mirror)
    plain["validate_image"] = [str(path) for path in settings.validate_image]
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def write_config(run: Run, folder: Path) -> None:
    """``config.toml``: every setting, as ``--config`` reads it, for a resume and for a new run.

    One that somebody has changed is set aside.
    """
    made = Made.read(folder)
    assert made, folder  # it is claimed
    folder = folder.absolute()
    lines = [f"# {command_line('cogtrain', run.method.name, '--config', folder / CONFIG_FILE)}"]
    resolved = dataclasses.replace(
        _absolute(run.settings),
        out=folder,
        model=run.checkpoint.name + (f"@{run.checkpoint.revision}" if run.checkpoint.revision else ""),
        precision=run.precision,
        # As asked for: what came of them on these processes, a checkpoint knows, and a new run may have others.
        strategy=run.given.strategy,
        accumulate=run.given.accumulate,
        global_batch=run.given.global_batch,
        config=None,
        resume="auto",  # the command that resumes a stopped run names this file
        steps=run.steps,
        epochs=None,
    )
    if signed := _signed(run.settings):
        lines.append(f"# Signatures and passwords of URLs are left out: give {', '.join(signed)} again.")
    values = settings_json(resolved)
    lines += [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    try:
        made.set_aside(CONFIG_FILE)
        made.commit_bytes(CONFIG_FILE, ("\n".join(lines) + "\n").encode())
    except UnicodeEncodeError as error:
        raise RunError(
            "a path of this run is no UTF-8, which its config.toml cannot hold",
            where=str(folder),
            fix="rename the folder, or name it by a link (ln -s)",
        ) from error


def told_of_move(settings: TrainSettings) -> str:
    """Says that the run whose config.toml is named lies elsewhere now than when that was written; else empty.

    Raises:
        RunError: it is a copy of a run that is still there, and would write over that one's mirror.
    """
    config, here = settings.config, settings.out
    if config is None or here is None or config.name != CONFIG_FILE or config.parent.resolve() != here.resolve():
        return ""
    then = read_settings(here)
    was = Path(str(then.get("out") or here))
    if was.resolve() == here.resolve():
        return ""
    if not (was / FACTS_FILE).is_file():
        return f"this run has moved: was {was}, is {here}"
    if settings.mirror is not None and without_secrets(settings.mirror) == then.get("mirror"):
        goes_on = command_line("--config", was / CONFIG_FILE)
        raise RunError(
            f"this run is a copy of {was}, which has the same mirror: it would write over that one's",
            where=f"{config}: mirror = {then['mirror']}",
            fix=f"--mirror with an address of its own, or take that line out; {goes_on} goes on with the run itself",
        )
    return f"this run is a copy: was {was}, which stays as it is; is {here}"


def _absolute(settings: TrainSettings) -> TrainSettings:
    """The settings with every path absolute, so that they mean the same in every working folder."""

    def absolute(word: str) -> str:
        return word if "://" in word or word.startswith(("/", "~")) else f"{Path.cwd()}/{word}"

    changed: dict[str, Any] = {
        field.name: value.absolute()
        for field in dataclasses.fields(settings)
        if isinstance(value := getattr(settings, field.name), Path)
    }
    for name in ("shards", "validate_shards"):
        changed[name] = [absolute(word) for word in getattr(settings, name)]
    changed["validate_image"] = [path.absolute() for path in settings.validate_image]
    changed["repeat"] = [word if is_size(split_repeat(word)[0]) else absolute(word) for word in settings.repeat]
    return dataclasses.replace(settings, **changed)


def _repeat_without_secrets(word: str) -> str:
    """A word of --repeat as people may see it: ``=N``, which stands behind what signs a URL, stays."""
    what, times = split_repeat(word)
    return f"{without_secrets(what)}={times}"


def _signed(settings: TrainSettings) -> list[str]:
    """The options that name URLs with signatures or passwords."""
    named = {
        "--shards": settings.shards, "--validate-shards": settings.validate_shards, "--repeat": settings.repeat,
        "--mirror": [settings.mirror or ""],
    }  # fmt: skip
    return [option for option, words in named.items() if any(without_secrets(word) != word for word in words)]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):  # JSON leaves the one control character as it is that TOML does not take
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
