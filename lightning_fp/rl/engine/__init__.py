"""Weights on their way to an inference engine: cast as in training, handed over, or written."""
