"""What the watch is measured on: nets it was not written for, faults, innocent runs, rival arms."""
