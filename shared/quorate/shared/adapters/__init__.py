"""The adapter value, which of its arrays a run trains, and PEFT's format of it."""
