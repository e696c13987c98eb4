"""The watch at work on a training loop, whatever loop it is."""
