"""Counts that sites send instead of rows, and intervals from them."""
