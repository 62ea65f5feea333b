"""Attacks on a run's own result, by whoever holds the rows: a site, or a simulation that holds all sites'."""
