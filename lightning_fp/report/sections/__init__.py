"""The sections of the report, by the question that each answers."""
