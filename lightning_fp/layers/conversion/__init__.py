"""From a model of nn.Linear to a table of formats, and the report of it."""
