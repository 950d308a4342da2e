"""Imports point down the layers, rooms of one layer never import each other, and stages never import stages."""

import ast
from pathlib import Path

import pytest

import moe_edge

PACKAGE = Path(moe_edge.__file__).parent
LAYERS = [
    ["contracts"],
    ["formulas", "storage"],
    ["families"],
    ["runtimes"],
    ["metrics", "demo"],
    ["profiling", "compression", "distillation", "export", "devices"],
    ["stages"],
    ["pipeline"],
    ["build", "doctor", "evaluate_cli", "logits_cli", "tables_cli"],
    ["cli"],
    ["__main__", "optimum_register"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def imported_rooms(path: Path) -> set[tuple[str, str]]:
    """(room, dotted module) of every import of moe_edge in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {(name.split(".")[1], name) for name in names if name.startswith("moe_edge.")}
    return {(room, name) for room, name in found if room in LEVEL}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_data" not in path.parts)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    wrong = [name for room, name in imported_rooms(path) if room != here and LEVEL[room] >= LEVEL[here]]
    assert not wrong, f"{here} may not import {wrong}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "stages").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_stages_do_not_import_stages(path):
    stage_names = {"profile", "plan", "compress", "distill", "export", "validate"}
    wrong = [
        name
        for _, name in imported_rooms(path)
        if name.startswith("moe_edge.stages.") and name.split(".")[2] in stage_names - {path.stem}
    ]
    assert not wrong


def test_every_module_says_what_it_does():
    silent = [
        path for path in modules() if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_contracts_need_no_torch():
    for path in (PACKAGE / "contracts").glob("*.py"):
        text = path.read_text()
        assert "import torch" not in text and "from torch" not in text, path


def test_the_walk_sees_violations(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from moe_edge.stages import plan\n")
    assert imported_rooms(bad) == {("stages", "moe_edge.stages.plan")}
