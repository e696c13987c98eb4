"""How the products of a mixture's experts are multiplied: many matrices, each by tokens of its own.

The tokens stand in one matrix, sorted by expert. A kernel multiplies each group of rows by its own
expert's weight, and every expert has scales of its own.
"""
