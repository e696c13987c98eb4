"""A plain loop as the watch sees it: steps that are made again, and what a step may change."""
