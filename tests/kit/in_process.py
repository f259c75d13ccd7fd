"""What runs in processes of its own otherwise, run in this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import typer
from typer.testing import CliRunner

from cogcommon.cli.command import add_command
from cogcommon.errors import CogError


class OneCommand:
    """A command of ours, as typed: ``OneCommand("generate", GenerateSettings, generate.run)``.

    It is called with the words that follow the name.
    A program of one command would take its name for a word, so there is another one beside it.
    """

    def __init__(self, name, settings, run) -> None:
        self._name = name
        self._app = typer.Typer(add_completion=False)
        for one in (name, "other"):
            add_command(self._app, one, settings, run, "Does it.")

    def __call__(self, *words):
        """What came of it: exit code, output, exception."""
        return CliRunner().invoke(self._app, [self._name, *map(str, words)])

    def fault(self, *words) -> str:
        """The words of the error that it must end in."""
        error = self(*words).exception
        assert isinstance(error, CogError), error
        return str(error)


class InlinePool:
    """As `cogprep.processes.pool.Pool`, without processes."""

    def __init__(self, *_arguments: object, **_options: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None: ...

    def run(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], **_options: object) -> Iterator[Any]:
        return (function(*task) for task in tasks)
