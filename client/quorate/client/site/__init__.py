"""The resident site: what it answers to each phase of a run, from joining to taking the result."""
