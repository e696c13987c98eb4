"""A recipe played over a run: what its gates go by, and what its stages do to the table."""
