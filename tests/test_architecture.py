"""Rules of the house, checked on the source: who imports whom, one forward, no pickle, short files."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

LIBRARY = sorted([*(ROOT / "extractor").rglob("*.py"), *(ROOT / "bridges").rglob("*.py")])
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_dependencies_point_downwards(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(path)}
    assert "recipes" not in roots
    assert "tests" not in roots
    if path.parent.name == "extractor":
        assert "bridges" not in roots


def test_the_report_needs_no_torch_of_its_own() -> None:
    for name in ("report.py", "drawing.py"):
        assert "torch" not in {m.partition(".")[0] for m in imports(ROOT / "bridges" / name)}


def test_attention_is_written_once() -> None:
    users = [path.name for path in LIBRARY if "scaled_dot_product_attention" in path.read_text()]
    assert users == ["layers.py"]


@pytest.mark.parametrize("path", [*LIBRARY, *RECIPES], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_are_short_and_load_no_pickle(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert "pickle" not in imports(path)
    assert "torch.load(" not in text
    assert "torch.save(" not in text
    assert ast.get_docstring(ast.parse(text))
