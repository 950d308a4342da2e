"""The shipped `evaluate` modules, loaded by their path: no hub, no shared cache, no state left behind.

`evaluate.load("rouge")` downloads and runs a script from the hub. Ours lie beside this file (`modules/<name>/<name>.py`) and
are loaded by folder. `evaluate` first copies a module into a cache of Python code and imports the copy, so the cache is a
private temporary folder: it is always writable, nobody else can put code there, and it vanishes with the process.
"""

import atexit
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem

MODULES = Path(__file__).resolve().parent / "modules"


def module_names() -> list[str]:
    """The names of the shipped modules."""
    return sorted(path.parent.name for path in MODULES.glob("*/*.py") if path.stem == path.parent.name)


@cache
def load_module(name: str) -> Any:
    """A shipped module, ready to `compute(predictions=..., references=...)`; loaded once per process.

    Raises:
        ConfigError: no such module.
        EnvironmentProblem: a library that it needs is not installed.
    """
    if name not in module_names():
        raise ConfigError(f"unknown text metric '{name}'", why=f"known: {', '.join(module_names())}")
    try:
        import evaluate
    except ImportError as error:
        raise EnvironmentProblem(
            "evaluate is not installed", why=str(error), next_command="pip install evaluate"
        ) from error
    scratch = _scratch()
    if (
        "evaluate_modules" not in sys.modules
    ):  # else code of another cache is imported already, and its package is fixed
        evaluate.config.HF_MODULES_CACHE = scratch / "code"
    try:
        return evaluate.load(str(MODULES / name), keep_in_memory=True, cache_dir=str(scratch / "data"))
    except ImportError as error:
        extra = "moe-edge[bertscore]" if name == "bertscore" else "moe-edge"
        raise EnvironmentProblem(
            f"the text metric '{name}' needs a library that is not installed",
            why=str(error).split(" using ")[0],
            next_command=f"pip install '{extra}'",
        ) from error


@cache
def _scratch() -> Path:
    """A private folder that is deleted when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="moe-edge-evaluate-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def compute(name: str, predictions: list[str], references: list[list[str]], **options: Any) -> dict[str, Any]:
    """One module's result for texts that are ready to be scored; at least one row.

    Raises:
        ValueError: different lengths.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} rows of references")
    result: dict[str, Any] = load_module(name).compute(predictions=predictions, references=references, **options)
    return result
