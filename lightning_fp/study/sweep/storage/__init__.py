"""Which cells of a sweep are open, claimed and done, for all who work on it."""
