"""Transformer Engine's products: its library, its recipes, the kernel over both."""
