"""Flower's programs at a site: what they may start, which bundle they carry, one answer to a message."""
