"""The subcommands of `quorate`, a file each, with heavy imports in the handlers: help is quick."""
