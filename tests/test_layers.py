"""Imports point down the layers, rooms of one layer never import each other, and no modules import each other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import moe_edge

PACKAGE = Path(moe_edge.__file__).parent
LAYERS = [
    ["contracts"],
    ["formulas", "storage"],
    ["process"],
    ["families"],
    ["models"],
    ["runtimes", "texts"],
    ["metrics", "demo"],
    ["profiling", "compression", "distillation", "exporting", "devices"],
    ["planning", "evaluation", "reporting"],
    ["stages"],
    ["pipeline"],
    ["delivery"],
    ["api"],
    ["cli"],
    ["__main__", "optimum_register"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
STAGES = {path.stem for path in (PACKAGE / "stages").glob("[a-z]*.py")}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_data" not in path.parts)


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Every moe_edge name that a file imports, dotted, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("moe_edge.")}


def breaches(path: Path, here: str) -> list[str]:
    """What a file of the room `here` may not import."""
    names = sorted(imported(path))
    rooms = {name: name.split(".")[1] for name in names if name.split(".")[1] in LEVEL}
    wrong = [name for name, room in rooms.items() if room != here and LEVEL[room] >= LEVEL[here]]
    if here == "stages":
        wrong += [name for name in names if name.split(".")[1] == here and name.split(".")[2] in STAGES - {path.stem}]
    return wrong


def test_imports_point_down():
    rooms = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    found = {dotted(path): breaches(path, room) for path, room in rooms.items() if room != "__init__"}
    assert len(found) > 150 and {name: wrong for name, wrong in found.items() if wrong} == {}


def test_no_modules_import_each_other_in_a_circle():
    known = {dotted(path): path for path in modules()}
    graph = {
        name: {one if one in known else one.rpartition(".")[0] for one in imported(path)} - {name}
        for name, path in known.items()
    }
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert order.index("moe_edge.contracts.errors") < order.index("moe_edge.pipeline")


def test_every_module_says_what_it_does():
    silent = [
        path for path in modules() if (text := path.read_text()).strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert not silent


def test_contracts_need_no_torch():
    for path in (PACKAGE / "contracts").glob("*.py"):
        text = path.read_text()
        assert "import torch" not in text and "from torch" not in text, path


def test_the_walk_sees_breaches(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from moe_edge.stages import plan\n")
    assert breaches(bad, "planning") == ["moe_edge.stages.plan"]
    assert breaches(bad, "stages") == ["moe_edge.stages.plan"] and breaches(bad, "pipeline") == []
