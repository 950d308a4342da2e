"""Tests of moe_edge.stages."""
