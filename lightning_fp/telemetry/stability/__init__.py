"""Signals that may tell of a divergence before the loss does, of every step."""
