"""The subcommands of `quorate`, a file each. Heavy imports stand in the handlers: help is quick."""
