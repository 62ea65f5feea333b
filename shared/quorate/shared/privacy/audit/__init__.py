"""Empirical audits: attacks that say how large epsilon is at least, which finds bugs and proves no claim."""
