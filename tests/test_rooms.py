"""The floor plan: what each room may import, said in its docstring and held against the code.

A room is a folder of `prep/`, `train/`, `common/` or `workshop/`, or one of the few files that lie at their top. The
docstring of a folder says what lives there and ends in "Imports a, b.", the rooms of its own program that its files
import. All may import `cogcommon`, which has its own rooms and the same rule.
"""

import ast
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from places import ROOT

PROGRAMS = {"common": "cogcommon", "prep": "cogprep", "train": "cogtrain", "workshop": "workshop"}
ALL = (*PROGRAMS, "tests")
MOST_FILES = 14
DOORS = {"cli.py", "__main__.py"}  # of a program: they may import every room


def sources(program: str) -> list[Path]:
    return sorted(path for path in (ROOT / program).rglob("*.py") if "__pycache__" not in path.parts)


def room_of(module: list[str]) -> str:
    """The room of a module, from its parts below the program: a folder, or a file at the top."""
    return module[0] if module else ""


def imported(path: Path, program: str) -> set[str]:
    """Rooms of its own program that a file imports."""
    here = [PROGRAMS[program], *path.relative_to(ROOT / program).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            modules = [[*base, alias.name] for alias in node.names] if len(base) == 1 else [base]
        else:
            continue
        found |= {room_of(module[1:]) for module in modules if module[0] == PROGRAMS[program]}
    return found


def arrows(program: str) -> dict[str, set[str]]:
    """From each room of a program to the rooms that its files import."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sources(program):
        inside = path.relative_to(ROOT / program)
        room = inside.parts[0].removesuffix(".py")
        if inside.parts[0] not in DOORS | {"__init__.py"}:
            found[room] |= imported(path, program) - {room, "__version__"}
    return found


def said(program: str, room: str) -> set[str] | None:
    """What the docstring of a room says that it imports; None of a file, which is a room of its own."""
    init = ROOT / program / room / "__init__.py"
    if not init.exists():
        return None
    text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
    match = re.search(r"Imports ([a-z_, \n]+)\.$", text)
    assert match, f"the docstring of {program}/{room} must end in 'Imports ...'"
    names = set(re.split(r",\s*", " ".join(match[1].split())))
    return set() if names == {"no other room"} else names


# A workshop's folders are tools that nobody imports; they say nothing.
ROOMS = [(program, room) for program in PROGRAMS if program != "workshop" for room in sorted(arrows(program))]


@pytest.mark.parametrize(("program", "room"), ROOMS)
def test_a_room_imports_what_it_says(program, room):
    may = said(program, room)
    if may is not None:
        assert arrows(program)[room] == may


@pytest.mark.parametrize("program", PROGRAMS)
def test_rooms_stand_in_one_order(program):
    """No circle: the rooms can be put in an order in which each imports only what stands before it."""
    left = {room: set(rooms) for room, rooms in arrows(program).items()}
    while left:
        first = [room for room, rooms in left.items() if not rooms & set(left)]
        assert first, f"a circle among { ({room: sorted(rooms & set(left)) for room, rooms in left.items()}) }"
        for room in first:
            del left[room]


# Python makes its __pycache__ folders while tests are collected: two processes that count them would never agree.
FOLDERS = sorted(
    folder
    for program in ALL
    for folder in [ROOT / program, *(ROOT / program).rglob("*")]
    if folder.is_dir() and folder.name != "__pycache__"
)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
    assert len(files) <= MOST_FILES, folder


def test_every_room_is_installed():
    """Each is listed by name: from the source tree all are found, and from a wheel those alone."""
    found = [
        ".".join([name, *init.parent.relative_to(ROOT / program).parts])
        for program, name in PROGRAMS.items()
        for init in (ROOT / program).rglob("__init__.py")
        if program != "workshop"
    ]
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found)


def test_the_tests_of_a_room_lie_under_its_name():
    for program in PROGRAMS:
        for folder in {path.parent for path in (ROOT / "tests" / program).rglob("test_*.py")}:
            assert (ROOT / folder.relative_to(ROOT / "tests")).is_dir(), folder
