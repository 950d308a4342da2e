"""moe-edge: take a Mixture-of-Experts teacher to a smaller, validated student for an edge device.

    from moe_edge import build
    run = build("path/to/teacher", target="jetson")

The names below are the public API (api.py); they are imported when they are first used, so that `import moe_edge` loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_edge.version import __version__ as __version__

if TYPE_CHECKING:
    from moe_edge.api import bench as bench
    from moe_edge.api import build as build
    from moe_edge.api import compress as compress
    from moe_edge.api import distill as distill
    from moe_edge.api import evaluate as evaluate
    from moe_edge.api import export as export
    from moe_edge.api import plan as plan
    from moe_edge.api import profile as profile
    from moe_edge.api import report as report
    from moe_edge.api import validate as validate
    from moe_edge.contracts.config import BuildConfig

    Config = BuildConfig
    from moe_edge.contracts.errors import MoeEdgeError as MoeEdgeError
    from moe_edge.contracts.plan import Plan as Plan
    from moe_edge.contracts.report import Report as Report

_HOME = {
    **dict.fromkeys(
        ("bench", "build", "compress", "distill", "evaluate", "export", "plan", "profile", "report", "validate"),
        ("moe_edge.api", None),
    ),
    "Config": ("moe_edge.contracts.config", "BuildConfig"),
    "MoeEdgeError": ("moe_edge.contracts.errors", None),
    "Plan": ("moe_edge.contracts.plan", None),
    "Report": ("moe_edge.contracts.report", None),
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name not in _HOME:
        raise AttributeError(f"module 'moe_edge' has no attribute '{name}'")
    module, original = _HOME[name]
    return getattr(import_module(module), original or name)
