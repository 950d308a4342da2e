"""Tests of moe_edge.compression."""
