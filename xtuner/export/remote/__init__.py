"""What `--with-code` copies into a model folder. Nothing here imports it; transformers 5 does, from there."""
