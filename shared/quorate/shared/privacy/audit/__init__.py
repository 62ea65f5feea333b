"""Empirical audits: attacks say how large epsilon is at least. They find bugs and prove no claim."""
