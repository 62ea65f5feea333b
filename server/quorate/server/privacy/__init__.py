"""Client-level differential privacy: its plan, clipping and noise at the server, what was released."""
