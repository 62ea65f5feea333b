"""The coordinator: rounds, checkpoints, evaluation and reports."""
