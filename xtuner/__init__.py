"""xtuner: train InternLM2-family language models on tokenized data."""

__version__ = "0.1.0"
