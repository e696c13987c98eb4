"""Delayed scaling: histories of amax, the scales that follow, and moves between scalings."""
