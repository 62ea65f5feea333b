"""The coordinator's server: nginx, SuperLink and SuperExec; checks before they start, and how they stand."""
