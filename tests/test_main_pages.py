"""The two main paths stay pages that are read from top to bottom: limits of their lines and of their nesting."""

import ast

import pytest
from places import ROOT

_BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)


def nesting(node: ast.AST, *, chained: bool = False) -> int:
    """How many blocks stand inside each other, at most; ``elif`` is no deeper than its ``if``.

    Args:
        chained: ``node`` is the only statement of an ``else``, and may be an ``elif``.
    """
    below = 0
    for name, field in ast.iter_fields(node):
        children = [child for child in (field if isinstance(field, list) else [field]) if isinstance(child, ast.AST)]
        only = isinstance(node, ast.If) and name == "orelse" and len(children) == 1
        below = max([below, *(nesting(child, chained=only) for child in children)])
    return below + (isinstance(node, _BLOCKS) and not (chained and isinstance(node, ast.If)))


def test_what_nesting_is():
    def of(text: str) -> int:
        return nesting(ast.parse(text))

    assert of("x = [a for a in b if a]") == 0
    assert of("def f():\n  for a in b:\n    with c:\n      if a: pass\n") == 3
    assert of("if a: pass\nelif b: pass\nelif c: pass\nelse:\n  for a in b: pass\n") == 2
    assert of("try:\n  pass\nexcept E:\n  if a: pass\n") == 2


# What is above the limit today may come down, and not go up.
@pytest.mark.parametrize(
    ("page", "lines", "deep"), [("train/trainer/trainer.py", 250, 3), ("prep/encode/part.py", 310, 4)]
)
def test_a_main_path_is_a_page(page, lines, deep):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n") <= lines
    assert nesting(ast.parse(text)) <= deep


def test_the_step_is_read_at_a_glance():
    """The optimizer step, from its name to its last line."""
    tree = ast.parse((ROOT / "train" / "trainer" / "trainer.py").read_text(encoding="utf-8"))
    (step,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "step"]
    assert step.end_lineno is not None and step.end_lineno - step.lineno < 30
