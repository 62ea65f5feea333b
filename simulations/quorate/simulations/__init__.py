"""Every site on one machine: the in-process grid, the Ray runner, partitions and sweeps."""
