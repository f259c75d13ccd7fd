"""The tables of the pages, and the files of configs/, are what they are made of: `make readme`."""

import re
from pathlib import Path

import pytest
from places import ROOT

from workshop.bench_train.hardware import config_files
from workshop.pages import PAGES, README, TRANSLATED, with_tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_pages_tables_are_what_they_are_made_of(page):
    assert with_tables(page) == page.read_text(encoding="utf-8"), "run `make readme`"


def test_the_files_of_the_rows_are_what_they_are_made_of():
    there = {f"configs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.toml")}
    assert config_files() == there, "run `make readme`"


@pytest.mark.parametrize(
    "line",
    [
        line
        for page in PAGES
        for line in re.findall(r"^cog(?:prep|train) [^#\n]*", page.read_text(encoding="utf-8"), re.M)
    ],
)
def test_every_command_line_of_the_readme_parses(line):
    """Every ``cogprep`` or ``cogtrain`` line names a command and options that exist."""
    program, _, rest = line.partition(" ")
    known = command_options(program)
    for command, *words in map(str.split, rest.split(" -- ")):  # of `launch`, another command follows
        assert command in known, line
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given <= known[command], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_the_pages_leads_somewhere(page):
    for target, part in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not part or part in anchors(there), f"{target}#{part}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_first_page_stays_short():
    """Without its tables and code: what a person reads before they type."""
    text = re.sub(r"```.*?```|^\|[^\n]*$", "", README.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert len(text.split()) < 1000


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_a_translation_has_the_parts_and_commands_of_the_first_page(page):
    def commands(path):
        return re.findall(r"^(?:cog(?:prep|train) |make |source )[^#\n]*?(?=\s*(?:#|$))", path.read_text("utf-8"), re.M)

    def parts(path):
        return len(re.findall(r"^## ", path.read_text("utf-8"), re.M))

    assert commands(page) == commands(README) and parts(page) == parts(README)


def command_options(program: str) -> dict[str, set[str]]:
    import typer.main

    app = __import__(f"{program}.cli", fromlist=["app"]).app
    commands = typer.main.get_command(app).commands
    return {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in commands.items()
    }
