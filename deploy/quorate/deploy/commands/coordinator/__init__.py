"""Commands of the coordinator of a real federation."""
