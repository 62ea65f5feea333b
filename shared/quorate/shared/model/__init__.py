"""The frozen base model: found, verified, loaded, with a head and LoRA layers on it."""
