"""Tests of moe_edge.families."""
