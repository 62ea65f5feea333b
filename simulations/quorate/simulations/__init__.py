"""Every site on one machine: the in-process grid, partitions, baselines, audits and searches."""
