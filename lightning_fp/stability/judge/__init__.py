"""From answers to a verdict: evidence, what each kind of it says, and what follows. Pure."""
