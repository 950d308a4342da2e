"""moe-edge: take a Mixture-of-Experts teacher to a smaller, validated student for an edge device."""

__version__ = "0.1.0"
