"""The tests mirror the rooms of moe_edge; `tests.tiny` builds the models they share."""
