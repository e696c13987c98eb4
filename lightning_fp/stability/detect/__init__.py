"""What is suspicious: signals of a step, what is usual for them, and the detectors over both."""
