"""What follows from a suspicion: limits, verdicts, attribution, the ladder, the policy."""
