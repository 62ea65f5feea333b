"""The rounds of a run: the loop, who is drawn, what an update must be, checkpoints, evaluation."""
