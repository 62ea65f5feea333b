"""Searching settings with Optuna: each trial is a federation of its own."""
