"""Commands on runs in one process, and on the folders that runs leave behind."""
