"""The runtimes as a table: kind -> module and class, imported only when one is opened.

`open_runtime("llama_cpp", path, threads, context_length)` is what the other rooms call, so that an installation
without one of the libraries still runs with the others.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem
from moe_edge.runtimes.base import Runtime

# kind -> (module, class, package on PyPI)
RUNTIMES: dict[str, tuple[str, str, str]] = {
    "hf": ("moe_edge.runtimes.hf", "HfRuntime", "transformers"),
    "llama_cpp": ("moe_edge.runtimes.llama_cpp", "LlamaCppRuntime", "llama-cpp-python"),
    "ort": ("moe_edge.runtimes.ort", "OrtRuntime", "onnxruntime"),
}


def open_runtime(kind: str, path: Path, threads: int, context_length: int, **options: Any) -> Runtime:
    """Open an artifact; `options` go to the adapter (for example `kv_float32=True` for llama_cpp).

    Raises:
        ConfigError: the kind is unknown.
        EnvironmentProblem: its library is not installed.
        InputRejected: the artifact cannot be opened.
    """
    if kind not in RUNTIMES:
        raise ConfigError(f"unknown runtime '{kind}'", why=f"known: {', '.join(RUNTIMES)}")
    module, name, package = RUNTIMES[kind]
    try:
        adapter = getattr(import_module(module), name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("moe_edge"):
            raise
        raise EnvironmentProblem(
            f"the runtime '{kind}' is not installed",
            why=f"no module named '{missing.name}'",
            next_command=f"pip install {package}",
        ) from missing
    runtime: Runtime = adapter(path, threads=threads, context_length=context_length, **options)
    return runtime
