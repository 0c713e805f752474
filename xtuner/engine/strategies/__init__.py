"""Training strategies: which one is used, and our own, which runs on any mesh."""
