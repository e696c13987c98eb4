"""FP16 as a base precision: the loss scale, what overflowed, and lent copies of the weights."""
