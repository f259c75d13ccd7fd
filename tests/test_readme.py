"""The README's tables of options are the settings themselves. ``make readme`` writes them anew."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from cogcommon.settings import flag_of, shown_default
from cogprep.settings import EncodeSettings
from cogtrain.settings import LoraSettings

README = Path(__file__).parents[1] / "README.md"
TABLES = {"cogprep encode": EncodeSettings, "cogtrain lora": LoraSettings}


def table(cls) -> str:
    rows = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        help = field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{flag_of(field)}` | {shown_default(field)} | {help} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    for name, cls in TABLES.items():
        mark = f"<!-- options of {name} -->"
        text, count = re.subn(
            rf"{re.escape(mark)}\n(?:\|.*\n)*", lambda _match, m=mark, c=cls: f"{m}\n{table(c)}\n", text
        )
        assert count == 1, f"the README has {count} places for the options of {name}"
    return text


def test_the_readme_has_the_options_as_they_are():
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `make readme`"


@pytest.mark.parametrize("line", re.findall(r"^cog(?:prep|train) [^#\n]*", README.read_text(encoding="utf-8"), re.M))
def test_every_command_line_of_the_readme_parses(line):
    """Every ``cogprep`` or ``cogtrain`` line names a command and options that exist."""
    program, command, *words = line.split()
    known = command_options(program)
    assert command in known, line
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert given <= known[command], line


def command_options(program: str) -> dict[str, set[str]]:
    import typer.main

    app = __import__(f"{program}.cli", fromlist=["app"]).app
    commands = typer.main.get_command(app).commands
    return {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in commands.items()
    }


if __name__ == "__main__" and "--write" in sys.argv:
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
