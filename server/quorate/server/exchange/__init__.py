"""Asking sites and waiting for them: messages over Flower, joining, who is away, who comes late."""
