"""A setting is one dataclass field: its type, its default and one sentence.

Help texts, command lines, TOML files and the tables in the README all derive
from the field. A command's options start as "not given", so that the order
"default, then file, then command line" needs no special case anywhere.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from .errors import CogError, SettingError

S = TypeVar("S")


def setting(
    default: Any,
    help: str,
    *,
    shown: str | None = None,
    flag: str | None = None,
    section: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare a setting.

    Args:
        default: the value when neither file nor command line gives one.
        help: one sentence.
        shown: what help prints as the default, where the value alone would not say it.
        flag: the option's name if it is not the field's.
        section: heading under which ``--help`` lists it.
        positional: a bare word on the command line (``cogprep inspect OUT``), not an option. Never a list:
            the words after another list option would land in it without a sound.
    """
    assert not (positional and isinstance(default, list))
    metadata = {"help": help, "shown": shown, "flag": flag, "section": section, "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """What a field is set with, as typed: ``--data-root``, or ``OUT`` where it is positional."""
    if field.metadata.get("positional"):
        return field.name.upper()
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def shown_default(field: dataclasses.Field[Any]) -> str:
    """The default as help and README print it."""
    if field.metadata.get("shown") is not None:
        return str(field.metadata["shown"])
    value = default_of(field)
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def resolve(cls: type[S], given: Mapping[str, Any], config: Path | None = None) -> S:
    """Defaults, then the TOML file, then what the command line gave (not None).

    Raises:
        SettingError: the file cannot be read, or names a setting that does not exist.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if config is not None:
        try:
            loaded = tomllib.loads(config.read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingError(f"cannot read the settings file: {error.strerror}", where=str(config)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingError(f"not TOML: {error}", where=str(config)) from error
        types = get_type_hints(cls)
        for key, value in loaded.items():
            name = key.replace("-", "_")
            if name not in known:
                raise SettingError(
                    f"no setting is called {key!r}",
                    where=str(config),
                    fix="settings have the names of the options: " + ", ".join(sorted(known)),
                )
            values[name] = _coerced(value, types[name], where=f"{config}: {key}")
    values.update({name: value for name, value in given.items() if value is not None})
    return cls(**values)


def _coerced(value: Any, annotation: Any, *, where: str) -> Any:
    """A TOML value as the field's type; the command line's own checks are Typer's."""
    options = [option for option in (get_args(annotation) or (annotation,)) if option is not type(None)]
    if get_origin(annotation) is list:
        inner = options[0]
        items = value if isinstance(value, list) else [value]
        return [_coerced(item, inner, where=where) for item in items]
    for option in options:
        if option in (str, int, float, bool, Path):
            if option is Path and isinstance(value, str):
                return Path(value)
            if option is float and isinstance(value, int) and not isinstance(value, bool):
                return float(value)
            if type(value) is option:
                return value
        elif get_origin(option) is list and isinstance(value, list):
            return _coerced(value, option, where=where)
        elif (get_args(option) and value in get_args(option)) or value == option:
            return value
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise SettingError(f"{value!r} is not {wanted}", where=where)


class _ListCommand(TyperCommand):
    """Lets every list option take several words: ``--shards a.tar b.tar``.

    A shell expands an unquoted ``out/*.tar`` into several words. Each becomes
    its own ``--shards``, wherever the option stands; words that belong to no
    option stay errors.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {
            name
            for parameter in self.params
            if getattr(parameter, "multiple", False)
            for name in parameter.opts
            if name.startswith("--")
        }
        spread: list[str] = []
        current: str | None = None  # the list option whose words we are among
        expects_value = False
        for index, word in enumerate(args):
            if word == "--":
                spread.extend(args[index:])
                break
            if word.startswith("-") and len(word) > 1 and not _is_number(word):
                name = word.split("=", 1)[0]
                current = name if name in lists else None
                expects_value = current is not None and "=" not in word
                spread.append(word)
            elif current is not None and not expects_value:
                spread += [current, word]
            else:
                expects_value = False
                spread.append(word)
        return super().parse_args(ctx, spread)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def add_command(app: typer.Typer, name: str, cls: type[S], run: Callable[[S], None], help: str) -> None:
    """Make ``run(settings)`` a command whose options are the fields of ``cls``.

    A field called ``config`` of type ``Path | None`` is read as a TOML file of the others.
    """
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]

    def command(**given: Any) -> None:
        run(resolve(cls, given, given.get("config")))

    parameters = []
    for field in fields:
        annotation = hints[field.name]
        flag = flag_of(field)
        if annotation is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        shared = {
            "help": field.metadata["help"],
            "show_default": shown_default(field),
            "rich_help_panel": field.metadata.get("section"),
        }
        if field.metadata.get("positional"):
            option: Any = typer.Argument(metavar=flag, **shared)
        else:
            option = typer.Option(flag, **shared)
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[annotation | None, option],
            )
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = help
    app.command(name, cls=_ListCommand, help=help)(command)


def run_app(app: typer.Typer) -> None:
    """Run a command line: exit 0 done, 2 the user can fix it, 1 a bug (traceback)."""
    from rich.console import Console
    from rich.markup import escape

    try:
        app()
    except CogError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        head, *rest = str(error).split("\n")
        console.print(f"[bold red]error:[/] [red]{escape(head)}[/]")
        for line in rest:
            console.print(escape(line))
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
