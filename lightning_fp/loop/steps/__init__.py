"""The steps of a plain loop: of the optimizers, and all that goes on around each."""
