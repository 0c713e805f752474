"""The ways to train: our own, on any mesh, and DeepSpeed's."""
