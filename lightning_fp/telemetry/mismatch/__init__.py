"""How far training is from the rollout engine: measured, judged, and what is done about it."""
