"""Arrows point one way: neither program imports the other, and common imports neither."""

import ast
from pathlib import Path

import pytest
from places import ROOT

FORBIDDEN = {
    "common": {"cogprep", "cogtrain", "workshop"},
    "prep": {"cogtrain", "workshop", "deepspeed", "peft"},
    "train": {"cogprep", "workshop"},
}


def imported_packages(source: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def common_modules(source: Path) -> set[Path]:
    """The files of cogcommon that a file imports: relatively from inside, by name from outside."""
    here = source.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module.split(".") if node.module else []
        if node.level:
            module = [*here[: len(here) - node.level + 1], *module]
        elif module[:1] == ["cogcommon"]:
            module[0] = "common"
        if module[:1] == ["common"]:
            for named in (module, *([*module, alias.name] for alias in node.names)):
                found |= {path for path in [ROOT.joinpath(*named).with_suffix(".py")] if path.exists()}
    return found


@pytest.mark.parametrize("side", FORBIDDEN)
def test_arrows_point_one_way(side):
    sources = sorted((ROOT / side).rglob("*.py"))
    assert sources
    wrong = {str(s.relative_to(ROOT)): found for s in sources if (found := imported_packages(s) & FORBIDDEN[side])}
    assert not wrong


def test_the_check_sees_a_forbidden_import(tmp_path):
    source = tmp_path / "x.py"
    source.write_text("def f():\n    from cogtrain.trainer.trainer import train\n    import cogprep.cli as cli\n")
    assert imported_packages(source) == {"cogtrain", "cogprep"}


def test_a_module_in_common_is_used_from_two_sides():
    """A module earns its place in common by being used by two of the programs, itself or through common."""
    common = {path for path in (ROOT / "common").rglob("*.py") if path.name != "__init__.py"}
    users: dict[Path, set[str]] = {path: set() for path in common}
    for side in ("prep", "train", "workshop"):
        waiting = [module for path in (ROOT / side).rglob("*.py") for module in common_modules(path)]
        while waiting:
            module = waiting.pop()
            if side not in users[module]:
                users[module].add(side)
                waiting += common_modules(module)
    assert [str(path) for path, sides in users.items() if len(sides) < 2] == []


def test_everything_is_printed_by_the_console_that_prints_names_as_they_are():
    """Rich's own would take a name for markup and let a terminal obey it (`cogcommon.cli.terminal`)."""
    for side in ("common", "prep", "train"):
        for file in (ROOT / side).rglob("*.py"):
            text = file.read_text()
            assert "rich.console import" not in text and "rich import print" not in text, file
