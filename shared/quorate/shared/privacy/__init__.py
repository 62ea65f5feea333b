"""Differential privacy: what a mechanism did (events), and what that costs (accounting)."""
