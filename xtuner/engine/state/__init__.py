"""What a checkpoint holds of a run's state, and how it is read and written."""
