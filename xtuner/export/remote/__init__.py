"""Code that `--with-code` copies into a model folder, where transformers 5 imports it. xtuner never does."""
