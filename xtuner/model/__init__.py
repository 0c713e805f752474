"""The network, and how to get one. Names here are what configs and users use."""

from xtuner.model.adapters.lora import lora
from xtuner.model.source import from_pretrained, from_scratch, load_pretrained

__all__ = ["from_pretrained", "from_scratch", "load_pretrained", "lora"]
