"""Counts and sums that sites send instead of rows, and what is made of them: intervals, a solved head."""
