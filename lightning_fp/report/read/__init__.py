"""What a run's records say, in figures."""
