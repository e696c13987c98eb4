"""What Transformer Engine asks of the layers: its scales, and what it refuses."""
