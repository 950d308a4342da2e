"""The version of moe-edge: in manifests, keys and the package."""

__version__ = "0.1.0"
