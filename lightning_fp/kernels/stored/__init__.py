"""Frozen weights of which only the FP8 cast and its scale are kept."""
