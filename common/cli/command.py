"""A command line out of settings: a program, its commands, and what they say when something is wrong."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..environment import set_variables
from ..errors import CogError, SettingError
from ..files.failures import machines_fault
from .mistyped import given_twice, in_our_words, no_such_command
from .progress import say, shown, stage
from .settings import default_of, flag_of, resolve, shown_default
from .streams import guard_output, outlive_output

S = TypeVar("S")

_UsageError: Any = typer.BadParameter.__mro__[1]  # of all that cannot be parsed; Typer does not export it
_TYPE_WIDTH = 16  # columns of help for what an option takes; choices are broken at their bars
_TYPE_NAMES = {str: "text", int: "number", float: "number", Path: "path", bool: ""}


_HELP = {"help_option_names": ["--help", "-h"]}


class _BareHelp:
    """Shows what takes no value without a type beside it, and of a bare word the type that people know."""

    positional: Mapping[str, str] = {}  # of bare words, by the names of their fields

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for parameter in params:
            if parameter.name in ("help", "install_completion", "show_completion"):
                parameter.metavar = ""
            if shown := self.positional.get(parameter.name):
                parameter.display_type_rich = lambda ctx, shown=shown: shown
        return params


class _Group(_BareHelp, TyperGroup):
    """Names the command that was meant."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            raise no_such_command(ctx.command_path, args[0], known)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [*args]  # which are emptied
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            raise in_our_words(ctx, self.params, words, error) from None


class _ListCommand(_BareHelp, TyperCommand):
    """Lets every list option take several words: ``--shards a.tar b.tar``.

    A shell expands an unquoted ``out/*.tar`` into several words. Each becomes
    its own ``--shards``, wherever the option stands; words that belong to no
    option stay errors.
    """

    prose: frozenset[str] = frozenset()  # options that take a sentence
    one_word: frozenset[str] = frozenset()  # list options that take one word each time they are given
    after_dashes = ""  # an example, if what follows -- is the command line of another command

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if self.after_dashes and not {"--", "--help", "-h"} & set(args):
            raise SettingError("no -- before what is to run", where=ctx.command_path, fix=self.after_dashes)
        lists = {
            name
            for parameter in self.params
            if getattr(parameter, "multiple", False)
            for name in parameter.opts
            if name.startswith("--") and name not in self.one_word
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
        for name in given_twice(self.params, spread):
            print(f"note: {name} is given twice; the last one counts", file=sys.stderr)
        try:
            return super().parse_args(ctx, [*spread])  # which it empties
        except _UsageError as error:
            raise in_our_words(ctx, self.params, spread, error, self.prose) from None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _show_version(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        print(f"{ctx.command.name} {__version__}")
        raise typer.Exit


_Version = Annotated[
    bool, typer.Option("--version", metavar="", help="Show the version.", is_eager=True, callback=_show_version)
]


def make_app(name: str, help: str) -> typer.Typer:
    """A program without commands yet; ``--version`` is there."""
    app = typer.Typer(
        name=name, cls=_Group, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
        context_settings=_HELP,
    )  # fmt: skip

    @app.callback(help=help)
    def _program(version: _Version = False) -> None:
        """Its options stand before the command."""

    return app


def add_command(
    app: typer.Typer, name: str, cls: type[S], run: Callable[[S], None], help: str, examples: Sequence[str] = (),
    panel: str | None = None, *, only_prints: bool = False,
) -> None:  # fmt: skip
    """Make ``run(settings)`` a command whose options are the fields of ``cls``.

    A field called ``config`` of type ``Path | None`` is read as a TOML file of the others. A ``KeyboardInterrupt`` is
    said in one line: its own words, where ``run`` knows what is there and how to go on.

    Args:
        help: the first line is what the program's own help says of the command.
        examples: command lines that ``--help`` ends with.
        panel: heading under which the program's own help lists it.
        only_prints: it ends where its output can be written no more; the work of others goes on.
    """
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    has_file = any(field.name == "config" for field in fields)
    lists = [field for field in fields if get_origin(hints[field.name]) is list]
    several = [field for field in lists if not field.metadata.get("one_word")]
    assert len(several) == 1 or not any(field.metadata.get("positional") for field in several)

    def command(**given: Any) -> None:
        if not only_prints:
            outlive_output()
        try:
            with stage("starting"):  # until a stage of the command's own: its libraries take seconds to import
                run(resolve(cls, given, given.get("config"), command=f"{app.info.name} {name}"))
        except KeyboardInterrupt as stopped:
            with suppress(OSError):
                say(str(stopped) or "stopped; run the same command again")
            raise

    parameters = []
    for field in fields:
        annotation = hints[field.name]
        flag = flag_of(field)
        shared: dict[str, Any] = {
            "help": _help_text(field),
            "show_default": False,  # Typer would put it into two kinds of brackets
            "rich_help_panel": field.metadata.get("section"),
        }
        if field.metadata.get("positional"):
            option: Any = typer.Argument(metavar=flag, **shared)
        else:
            # What is off stays off without being told, unless a file can switch it on.
            if annotation is bool and (default_of(field) or has_file):
                flag = f"{flag}/--no-{flag[2:]}"
            option = typer.Option(flag, metavar=_type_text(annotation), **shared)
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
    lines = [f"[bold]{_escaped(example)}[/]" for example in examples]
    epilog = "\n\n".join(["For example:", *lines]) if lines else None
    first, _, _ = help.partition("\n")
    one_word = frozenset(flag_of(field) for field in fields if field.metadata.get("one_word"))
    dashes = next(iter(examples), "") if any(field.metadata.get("after_dashes") for field in lists) else ""
    bare = {field.name: _type_text(hints[field.name]) for field in fields if field.metadata.get("positional")}
    prose = frozenset(flag_of(field) for field in fields if field.metadata.get("prose"))
    forms = {"prose": prose, "one_word": one_word, "after_dashes": dashes, "positional": bare}
    kind = type("_Command", (_ListCommand,), forms)
    made = app.command(
        name, cls=kind, help=help, short_help=first, epilog=epilog, rich_help_panel=panel, context_settings=_HELP
    )
    made(command)


def parse(program: str, name: str, cls: type[S], words: Sequence[str]) -> S:
    """The settings that a command line names, checked as the command itself would; nothing is run.

    Args:
        words: what follows the command's name.

    Raises:
        SettingError: there is no such option or value, or they do not go together; nothing but help was asked for.
    """
    found: list[S] = []
    app = make_app(program, "")
    add_command(app, name, cls, found.append, "")
    typer.main.get_command(app).main([name, *words], prog_name=program, standalone_mode=False)
    if not found:
        raise SettingError("this only asks for help", where=f"{program} {name} --help", fix="leave --help out")
    return found[0]


def _help_text(field: dataclasses.Field[Any]) -> str:
    """What the option is, then its default where it has one."""
    text = _escaped(field.metadata["help"])
    shown = shown_default(field)
    if shown == "required":
        return f"{text} [red]\\[required][/]"
    value = default_of(field)
    if field.metadata.get("shown") is None and (value is None or value is False or value == []):
        return text
    return f"{text} [dim]\\[default: {_escaped(shown)}][/]"


def _type_text(annotation: Any) -> str:
    """What an option takes, in a column of `_TYPE_WIDTH`: ``path``, ``number``, ``crop|stretch|pad``."""
    options = [option for option in (get_args(annotation) or (annotation,)) if option is not type(None)]
    if get_origin(annotation) is list:
        return f"{_type_text(options[0])} ..."
    if len(options) == 1 and not isinstance(options[0], str):
        option = options[0]
        if get_origin(option) is not None:
            return _type_text(option)
        return _TYPE_NAMES.get(option, str(option))
    lines = [""]
    for index, choice in enumerate(options):
        word = f"{choice}" + "|" * (index < len(options) - 1)
        if lines[-1] and len(lines[-1] + word) > _TYPE_WIDTH:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """A text as rich prints it unchanged."""
    from rich.markup import escape

    return escape(text)


def run_app(app: Callable[[], None]) -> None:
    """Run a command line: exit 0 done, an error's code (2: the user can fix it), 1 a bug (traceback)."""
    from .terminal import print_in_any_encoding

    print_in_any_encoding()
    guard_output()
    variables = set_variables()
    try:
        with shown():
            app()
        sys.stdout.flush()  # what fails only at the interpreter's end has no one to say it
    except CogError as error:
        _end(error)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        fault = machines_fault(error)
        if fault is None:
            raise
        _end(fault)
    finally:  # who calls this may start programs that are not ours
        for name in variables:
            os.environ.pop(name, None)


def _end(error: CogError) -> NoReturn:
    """Say it and exit, even where the output is on the disk that is full."""
    from .terminal import show_error

    with suppress(OSError):
        show_error(error)
    sys.exit(error.code)
