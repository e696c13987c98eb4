"""What belongs to a run and not to one callback: directory, log of events, settings, losses."""
