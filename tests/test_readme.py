"""The README's tables are the settings themselves, and the data of what was measured. ``make readme`` writes them."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from cogcommon.cli.settings import flag_of, shown_default
from cogprep.settings import EncodeSettings
from cogtrain.settings import LoraSettings
from workshop.bench_train.hardware import beside_table, guide_table, measured_table

README = Path(__file__).parents[1] / "README.md"
OPTIONS = {"cogprep encode": EncodeSettings, "cogtrain lora": LoraSettings}


def table(cls) -> str:
    rows = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        help = field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{flag_of(field)}` | {shown_default(field)} | {help} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    tables = {f"options of {name}": table(cls) for name, cls in OPTIONS.items()}
    tables |= {
        "hardware table": guide_table(),
        "beside a plain loop": beside_table(),
        "runs measured": measured_table(),
    }
    for name, rows in tables.items():
        mark = f"<!-- {name} -->"
        text, count = re.subn(rf"{mark}\n(?:\|.*\n)*", lambda _match, m=mark, r=rows: f"{m}\n{r}\n", text)
        assert count == 1, f"the README has {count} places for: {name}"
    return text


def test_the_readmes_tables_are_what_they_are_made_of():
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
