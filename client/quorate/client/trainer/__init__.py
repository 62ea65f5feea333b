"""The trainer: a stack of K sites' adapters on one frozen base."""
