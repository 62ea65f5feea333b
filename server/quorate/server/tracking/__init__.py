"""How a run is followed: its records, events, trackers and status."""
