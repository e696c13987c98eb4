"""What a run can go back to: snapshots of its state, and the batches since."""
