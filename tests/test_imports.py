"""Arrows point one way: neither program imports the other, and common imports neither."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "common": {"cogprep", "cogtrain"},
    "prep": {"cogtrain", "deepspeed", "peft"},
    "train": {"cogprep"},
}


def imported_packages(source: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def common_modules(source: Path, *, inside: bool) -> list[str]:
    """Modules of cogcommon that a file imports: relatively from inside, by name from outside."""
    found = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if inside and node.level == 1:
            found.append(node.module)
        elif node.level == 0 and node.module.split(".")[0] == "cogcommon":
            found += node.module.split(".")[1:2] or [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("side", FORBIDDEN)
def test_arrows_point_one_way(side):
    sources = sorted((ROOT / side).rglob("*.py"))
    assert sources
    wrong = {str(s.relative_to(ROOT)): found for s in sources if (found := imported_packages(s) & FORBIDDEN[side])}
    assert not wrong


def test_the_check_sees_a_forbidden_import(tmp_path):
    source = tmp_path / "x.py"
    source.write_text("def f():\n    from cogtrain.loop import train\n    import cogprep.cli as cli\n")
    assert imported_packages(source) == {"cogtrain", "cogprep"}


def test_a_module_in_common_is_used_from_both_sides():
    """A module earns its place in common by being used by both programs, itself or through common."""
    common = {path.stem for path in (ROOT / "common").glob("*.py")} - {"__init__"}
    reach = {"prep": set(), "train": set()}
    for side, seen in reach.items():
        waiting = [name for path in (ROOT / side).rglob("*.py") for name in common_modules(path, inside=False)]
        while waiting:
            name = waiting.pop()
            if name in common - seen:
                seen.add(name)
                waiting += common_modules(ROOT / "common" / f"{name}.py", inside=True)
    assert common - (reach["prep"] & reach["train"]) == set()


def test_everything_is_printed_by_the_console_that_prints_names_as_they_are():
    """Rich's own would take a name for markup and let a terminal obey it (`cogcommon.terminal`)."""
    for side in ("common", "prep", "train"):
        for file in (ROOT / side).rglob("*.py"):
            text = file.read_text()
            assert "rich.console import" not in text and "rich import print" not in text, file
