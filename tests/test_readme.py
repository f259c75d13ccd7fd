"""The tables of README and configs/README.md, and the files of configs/, are what they are made of: `make readme`."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from cogcommon.cli.settings import flag_of, shown_default
from cogprep.settings import CaptionSettings, EncodeSettings
from cogtrain.settings import LoraSettings
from workshop.bench_train.hardware import beside_table, config_files, guide_table, measured_table
from workshop.bench_train.verdicts import verdict_table

ROOT = Path(__file__).parents[1]
README, HARDWARE = ROOT / "README.md", ROOT / "configs/README.md"
OPTIONS = {"cogprep encode": EncodeSettings, "cogprep caption": CaptionSettings, "cogtrain lora": LoraSettings}


def table(cls) -> str:
    rows = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        help = field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{flag_of(field)}` | {shown_default(field)} | {help} |")
    return "\n".join(rows)


def tables_of(page: Path) -> dict[str, str]:
    """The tables of a page by the mark before each."""
    if page == HARDWARE:
        return {"hardware table": guide_table(), "what fits": verdict_table(), "runs measured": measured_table()}
    return {f"options of {name}": table(cls) for name, cls in OPTIONS.items()} | {"beside a plain loop": beside_table()}


def with_tables(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    for name, rows in tables_of(page).items():
        mark = f"<!-- {name} -->"
        text, count = re.subn(rf"{mark}\n(?:\|.*\n)*", lambda _match, m=mark, r=rows: f"{m}\n{r}\n", text)
        assert count == 1, f"{page} has {count} places for: {name}"
    return text


@pytest.mark.parametrize("page", [README, HARDWARE], ids=["README", "configs/README"])
def test_a_pages_tables_are_what_they_are_made_of(page):
    assert with_tables(page) == page.read_text(encoding="utf-8"), "run `make readme`"


def test_the_files_of_the_sixteen_rows_are_what_they_are_made_of():
    there = {f"configs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.toml")}
    assert config_files() == there, "run `make readme`"


@pytest.mark.parametrize(
    "line",
    [
        line
        for page in (README, HARDWARE)
        for line in re.findall(r"^cog(?:prep|train) [^#\n]*", page.read_text(encoding="utf-8"), re.M)
    ],
)
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
    for file, text in config_files().items():
        (ROOT / file).write_text(text, encoding="utf-8")
    for page in (README, HARDWARE):
        page.write_text(with_tables(page), encoding="utf-8")
