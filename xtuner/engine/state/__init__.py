"""Weights and optimizer state: the shards of a process, and how checkpoints store them."""
