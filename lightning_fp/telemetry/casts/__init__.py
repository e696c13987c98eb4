"""What formats do to the numbers of a step, layer by layer: sampled, summed up, warned of."""
