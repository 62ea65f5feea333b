"""A site's rows: read, placed in splits, mapped to a task's columns, and looked at for faults."""
