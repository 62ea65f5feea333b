"""Commands and options that the coordinator's wheel and the sites' wheel have in common."""
