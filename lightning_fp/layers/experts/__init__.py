"""Experts whose weights are Parameters of three dimensions: rows of the table like any layer."""
