"""What makes an optimizer step: the base precision, the loss scale, the guard; in any loop."""
