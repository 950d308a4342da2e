"""Tests of moe_edge.runtimes."""
