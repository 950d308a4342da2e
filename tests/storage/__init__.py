"""Tests of moe_edge.storage."""
